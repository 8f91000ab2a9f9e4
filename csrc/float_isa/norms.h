// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm of a row that stays in the L1 cache: one pass for the mean, one for the variance around it, one for
// the result. Sums are added in the same order on every instruction set, so that bits are the same, too.
#pragma once

#include "vector.h"

namespace octavo {
namespace {

// sum = add(sum, i, n) for the elements i .. i + n of a row, 16 at a time, in four sums.
template <class Add>
float sum_over(std::int64_t count, const Add& add) {
  Vector sums[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], i + 16 * j, std::int64_t{16});
  }
  for (int j = 0; i < count; i += 16, ++j) sums[j] = add(sums[j], i, count - i);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// What is normalized, from x and the residual, on the first pass.
template <FloatType kType>
inline Vector add_residual(const Norm& n, std::int64_t i, std::int64_t count) {
  const Vector x = load<kType>(n.x, i, count);
  if (!n.residual) return x;
  const Vector sum = x + load<kType>(n.residual, i, count);
  store<kType>(n.sum, i, sum, count);
  return kType == FloatType::f32 ? sum : load<kType>(n.sum, i, count);
}

template <FloatType kType>
void norm_row(const Norm& n) {
  const void* const t = n.residual ? n.sum : n.x;
  const auto length = static_cast<float>(n.count);
  float mean = 0.0f, squares = 0.0f;
  if (n.rms) {
    squares = sum_over(n.count, [&](Vector sum, std::int64_t i, std::int64_t count) {
      const Vector value = add_residual<kType>(n, i, count);
      return multiply_add(value, value, sum);
    });
  } else {
    mean = sum_over(n.count, [&](Vector sum, std::int64_t i,
                                 std::int64_t count) { return sum + add_residual<kType>(n, i, count); }) /
           length;
    squares = sum_over(n.count, [&](Vector sum, std::int64_t i, std::int64_t count) {
      const Vector value = keep(load<kType>(t, i, count) - set(mean), count);
      return multiply_add(value, value, sum);
    });
  }
  const Vector inverse = set(1.0f) / sqrt(set(squares / length + n.eps));
  for (std::int64_t i = 0; i < n.count; i += 16) {
    const std::int64_t count = n.count - i;
    const Vector value = (load<kType>(t, i, count) - set(mean)) * inverse;
    const Vector weight = load<FloatType::f32>(n.weight, i, count);
    const Vector y = n.bias ? multiply_add(value, weight, load<FloatType::f32>(n.bias, i, count)) : value * weight;
    store<kType>(n.y, i, y, count);
  }
}

inline void norm(const Norm& n) {
  with_type(n.type, [&](auto type) { norm_row<decltype(type)::value>(n); });
}

}  // namespace
}  // namespace octavo
