// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding, x cos + rotate_half(x) sin. The second product is rounded, then an fma adds the first one.
#pragma once

#include "isa/float/vector/vector.h"

namespace octavo {
namespace {

template <FloatType kType, FloatType kAngles>
void rotate_rows(const Rotate& all) {
  const Rotate r = all;
  const std::int64_t half = r.rotated / 2;
  for (std::int64_t row = 0; row < r.rows; ++row) {
    const std::int64_t from = row * r.x_stride, angle = row * r.angle_stride, to = row * r.out_stride;
    each_vector(half, [&](std::int64_t j, std::int64_t lanes) {
      const std::int64_t low = angle + j, high = angle + half + j;
      const Vector a = load<kType>(r.x, from + j, lanes), b = load<kType>(r.x, from + half + j, lanes);
      const Vector b_sin = b * load<kAngles>(r.sin, low, lanes), a_sin = a * load<kAngles>(r.sin, high, lanes);
      store<kType>(r.out, to + j, multiply_add(a, load<kAngles>(r.cos, low, lanes), set(0.0f) - b_sin), lanes);
      store<kType>(r.out, to + half + j, multiply_add(b, load<kAngles>(r.cos, high, lanes), a_sin), lanes);
    });
    each_vector(r.columns - r.rotated, [&](std::int64_t j, std::int64_t lanes) {
      store<kType>(r.out, to + r.rotated + j, load<kType>(r.x, from + r.rotated + j, lanes), lanes);
    });
  }
}

inline void rotate(const Rotate& r) {
  with_type(r.type, [&](auto type) {
    with_type(r.angle_type, [&](auto angles) { rotate_rows<decltype(type)::value, decltype(angles)::value>(r); });
  });
}

}  // namespace
}  // namespace octavo
