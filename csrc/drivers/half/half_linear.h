// SPDX-License-Identifier: Apache-2.0
// The linear layer whose weight is 16-bit floats, kept as they are, and whose activations are float32.
#pragma once

#include "drivers/linear.h"

namespace octavo {

struct HalfWeight {
  const std::uint16_t* strips;  // H16, as contract/layout.h draws it
  FloatType type;               // bf16 or f16
  const float* bias;            // [n] or null
  std::int64_t n, k;
};

// out = activation(x weight^T + bias). x is widened to float32, products are added up in float32 in ascending order of k, each
// by one fma, and outputs are rounded once. NaN and Inf are numbers like any other.
void linear_half(const Activations& x, const HalfWeight& weight, Output out);

}  // namespace octavo
