// SPDX-License-Identifier: Apache-2.0
// LayerNorm and RMSNorm of a row that stays in the L1 cache. The first pass computes the mean, the second one the variance
// around the mean, the third one the result. All instruction sets add sums in the same order, so that they give the same bits.
#pragma once

#include "isa/float/vector/vector.h"

namespace octavo {
namespace {

// Calls sum = add(sum, i, lanes) for each vector of a row, with four sums in turn, and adds these up.
template <class Add>
inline float sum_over(std::int64_t count, const Add& add) {
  Vector a = set(0.0f), b = a, c = a, d = a;
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    a = add(a, i, std::int64_t{16});
    b = add(b, i + 16, std::int64_t{16});
    c = add(c, i + 32, std::int64_t{16});
    d = add(d, i + 48, std::int64_t{16});
  }
  if (i < count) a = add(a, i, count - i);
  if (i + 16 < count) b = add(b, i + 16, count - i - 16);
  if (i + 32 < count) c = add(c, i + 32, count - i - 32);
  if (i + 48 < count) d = add(d, i + 48, count - i - 48);
  return sum_of((a + b) + (c + d));
}

// The values to normalize: x, or x + residual, which the first pass stores in n.sum.
template <FloatType kType, bool kResidual>
inline Vector add_residual(const Norm& n, std::int64_t i, std::int64_t lanes) {
  const Vector x = load<kType>(n.x, i, lanes);
  if constexpr (!kResidual) return x;
  const Vector sum = x + load<kType>(n.residual, i, lanes);
  store<kType>(n.sum, i, sum, lanes);
  return kType == FloatType::f32 ? sum : load<kType>(n.sum, i, lanes);
}

template <FloatType kType, bool kResidual>
void norm_row(const Norm& row) {
  const Norm n = row;
  const void* const t = kResidual ? n.sum : n.x;
  const auto length = static_cast<float>(n.count);
  float mean = 0.0f, squares = 0.0f;
  if (n.rms) {
    squares = sum_over(n.count, [&](const Vector& sum, std::int64_t i, std::int64_t lanes) {
      const Vector value = add_residual<kType, kResidual>(n, i, lanes);
      return multiply_add(value, value, sum);
    });
  } else {
    mean = sum_over(n.count, [&](const Vector& sum, std::int64_t i,
                                 std::int64_t lanes) { return sum + add_residual<kType, kResidual>(n, i, lanes); }) /
           length;
    squares = sum_over(n.count, [&](const Vector& sum, std::int64_t i, std::int64_t lanes) {
      const Vector value = load<kType>(t, i, lanes) - set(mean);
      const Vector kept = lanes >= 16 ? value : keep(value, lanes);
      return multiply_add(kept, kept, sum);
    });
  }
  const Vector inverse = set(1.0f) / sqrt(set(squares / length + n.eps));
  each_vector(n.count, [&](std::int64_t i, std::int64_t lanes) {
    const Vector value = (load<kType>(t, i, lanes) - set(mean)) * inverse;
    const Vector weight = load<FloatType::f32>(n.weight, i, lanes);
    const Vector y = n.bias ? multiply_add(value, weight, load<FloatType::f32>(n.bias, i, lanes)) : value * weight;
    store<kType>(n.y, i, y, lanes);
  });
}

inline void norm(const Norm& n) {
  with_type(n.type, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    return n.residual ? norm_row<kType, true>(n) : norm_row<kType, false>(n);
  });
}

}  // namespace
}  // namespace octavo
