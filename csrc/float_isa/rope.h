// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding: x cos + rotate_half(x) sin, the second product added in the first one's fma.
#pragma once

#include "vector.h"

namespace octavo {
namespace {

template <FloatType kType, FloatType kAngles>
void rotate_rows(const Rotate& r) {
  const std::int64_t half = r.rotated / 2;
  for (std::int64_t row = 0; row < r.rows; ++row) {
    const std::int64_t from = row * r.x_stride, angle = row * r.angle_stride, to = row * r.out_stride;
    for (std::int64_t j = 0; j < half; j += 16) {
      const std::int64_t count = half - j, low = angle + j, high = angle + half + j;
      const Vector a = load<kType>(r.x, from + j, count), b = load<kType>(r.x, from + half + j, count);
      const Vector b_sin = b * load<kAngles>(r.sin, low, count), a_sin = a * load<kAngles>(r.sin, high, count);
      store<kType>(r.out, to + j, multiply_add(a, load<kAngles>(r.cos, low, count), set(0.0f) - b_sin), count);
      store<kType>(r.out, to + half + j, multiply_add(b, load<kAngles>(r.cos, high, count), a_sin), count);
    }
    for (std::int64_t j = r.rotated; j < r.columns; j += 16) {
      store<kType>(r.out, to + j, load<kType>(r.x, from + j, r.columns - j), r.columns - j);
    }
  }
}

inline void rotate(const Rotate& r) {
  with_type(r.type, [&](auto type) {
    with_type(r.angle_type, [&](auto angles) { rotate_rows<decltype(type)::value, decltype(angles)::value>(r); });
  });
}

}  // namespace
}  // namespace octavo
