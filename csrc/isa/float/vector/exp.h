// SPDX-License-Identifier: Apache-2.0
// 2^x over a Vector.
#pragma once

#include "vector.h"

namespace octavo {
namespace {

// The relative error is below 1.5e-7. The result is 0 below -150 and Inf above 128, and NaN stays NaN. A polynomial gives
// 2^(x - round(x)), whose exponent is at most 1/2 in size.
inline Vector exp2(const Vector& x) {
  const Vector limited = max(set(-150.0f), x), n = round_half_even(limited), r = limited - n;
  Vector p = set(1.5403530e-4f);
  p = multiply_add(p, r, set(1.3333558e-3f));
  p = multiply_add(p, r, set(9.6181291e-3f));
  p = multiply_add(p, r, set(5.5504109e-2f));
  p = multiply_add(p, r, set(0.24022651f));
  p = multiply_add(p, r, set(0.69314718f));
  p = multiply_add(p, r, set(1.0f));
  return scale_by_power(p, n);
}

// The relative error is below 1.02e-4, far less than what rounding to bfloat16 or to 8 bits adds. 2^0 is exactly 1.
inline Vector exp2_coarse(const Vector& x) {
  const Vector limited = max(set(-150.0f), x), n = round_half_even(limited), r = limited - n;
  Vector p = set(0.05500893f);
  p = multiply_add(p, r, set(0.24221096f));
  p = multiply_add(p, r, set(0.69328293f));
  p = multiply_add(p, r, set(1.0f));
  return scale_by_power(p, n);
}

}  // namespace
}  // namespace octavo
