// SPDX-License-Identifier: Apache-2.0
// Rows of floats to codes and back, and their ranges, over a Vector: written once for AVX2 and AVX512. scalar.cpp defines
// what these functions do and shares no code with them.
#pragma once

#include "bytes.h"
#include "isa/float/vector/vector.h"

namespace octavo {
namespace {

// Calls f(i, count) for the values i .. i + count of a row: kVectors Vectors at a time, then the rest. As in each_vector,
// the compiler knows the count of all calls but the last.
template <int kVectors, class F>
inline void each_part(std::int64_t count, const F& f) {
  constexpr std::int64_t kPart = 16 * kVectors;
  std::int64_t i = 0;
  for (; i + kPart <= count; i += kPart) f(i, kPart);
  if (i < count) f(i, count - i);
}

// Vector v of a part that begins at value i and has `count` values. Lanes beyond the last value are 0.
template <FloatType kType>
inline Vector load_part(const void* x, std::int64_t i, std::int64_t count, int v) {
  const std::int64_t left = count - 16 * v;
  return left >= 16 ? load<kType>(x, i + 16 * v) : load<kType>(x, i + 16 * v, left > 0 ? left : 0);
}

template <FloatType kType>
float absmax_of(const void* x, std::int64_t count) {
  Vector largest[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  each_part<4>(count, [&](std::int64_t i, std::int64_t part) {
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) {
      largest[v] = max_magnitude(largest[v], abs(load_part<kType>(x, i, part, v)));
    }
  });
  return largest_magnitude(max_magnitude(max_magnitude(largest[0], largest[1]), max_magnitude(largest[2], largest[3])));
}

float absmax(const void* x, FloatType type, std::int64_t count) {
  return with_type(type, [&](auto constant) { return absmax_of<decltype(constant)::value>(x, count); });
}

template <FloatType kType>
RowRange min_max_of(const void* x, std::int64_t count) {
  const Vector zero = set(0.0f);
  Vector least[2] = {zero, zero}, most[2] = {zero, zero}, largest[2] = {zero, zero};
  each_part<2>(count, [&](std::int64_t i, std::int64_t part) {
    OCTAVO_UNROLL for (int v = 0; v < 2; ++v) {
      const Vector value = load_part<kType>(x, i, part, v);
      least[v] = min(value, least[v]);
      most[v] = max(value, most[v]);
      largest[v] = max_magnitude(largest[v], abs(value));
    }
  });
  const float nan = __builtin_nanf("");
  if (!(largest_magnitude(max_magnitude(largest[0], largest[1])) < __builtin_inff())) return {nan, nan};
  const float below = largest_of(zero - min(least[0], least[1]));  // how far the least value lies below 0
  return {0.0f - below, largest_of(max(most[0], most[1]))};
}

RowRange min_max(const void* x, FloatType type, std::int64_t count) {
  return with_type(type, [&](auto constant) { return min_max_of<decltype(constant)::value>(x, count); });
}

// Multiples of 1 / inverse_scale within [low, high], not yet rounded; 0 for NaN.
struct Steps {
  Steps(float inverse_scale, std::int32_t low_step, std::int32_t high_step)
      : inverse(set(inverse_scale)), low(set(static_cast<float>(low_step))), high(set(static_cast<float>(high_step))) {}

  Vector of(const Vector& x) const { return bounded(x * inverse, low, high); }

  Vector inverse, low, high;
};

template <FloatType kType>
bool quantize_row_of(const QuantizeRow& all) {
  const QuantizeRow row = all;  // a copy, so that no store can change it
  const Steps steps(row.inverse_scale, row.qmin - row.zero_point, row.qmax - row.zero_point);
  Vector largest = set(0.0f);
  each_part<4>(row.count, [&](std::int64_t i, std::int64_t part) {
    Vector numbers[4];
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) {
      const Vector x = load_part<kType>(row.x, i, part, v);
      largest = max_magnitude(largest, abs(x));
      numbers[v] = steps.of(x);
    }
    Words64 codes(numbers);
    codes += row.zero_point;
    store_part(row.codes + i, part, codes.low_bytes());
  });
  return largest_magnitude(largest) < __builtin_inff();
}

bool quantize_row(const QuantizeRow& row) {
  return with_type(row.type, [&](auto type) { return quantize_row_of<decltype(type)::value>(row); });
}

template <FloatType kType>
void split_row_of(const SplitRow& all) {
  const SplitRow row = all;
  const Steps steps(row.inverse_scale, -kMax16, kMax16);
  each_part<4>(row.count, [&](std::int64_t i, std::int64_t part) {
    Vector numbers[4];
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) numbers[v] = steps.of(load_part<kType>(row.x, i, part, v));
    Words64 words(numbers);
    store_part(row.low + i, part, words.low_bytes());
    words >>= 8;
    words += 128;
    store_part(row.high + i, part, words);
  });
}

void split_row(const SplitRow& row) {
  with_type(row.type, [&](auto type) { split_row_of<decltype(type)::value>(row); });
}

template <FloatType kType>
void dequantize_row_of(const DequantizeRow& all) {
  const DequantizeRow row = all;
  const Vector scale = set(row.scale);
  each_vector(row.count, [&](std::int64_t i, std::int64_t lanes) {
    const Vector steps = load_steps(row.codes + i, lanes, row.is_signed, row.zero_point);
    store<kType>(row.out, i, steps * scale, lanes);
  });
}

void dequantize_row(const DequantizeRow& row) {
  with_type(row.type, [&](auto type) { dequantize_row_of<decltype(type)::value>(row); });
}

}  // namespace
}  // namespace octavo
