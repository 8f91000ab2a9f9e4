// SPDX-License-Identifier: Apache-2.0
// 16 floats in two ymm registers. Functions take a Vector by reference: where g++ 12 does not inline a function, it does not
// always align the stack for two ymm registers that are passed by value.
#pragma once

#include "contract/float_kernel.h"
#include "isa/common/lanes_avx2.h"

namespace octavo {
namespace {

struct Vector {
  __m256 low, high;
};

inline Vector set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vector operator+(const Vector& a, const Vector& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Vector operator-(const Vector& a, const Vector& b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Vector operator*(const Vector& a, const Vector& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Vector operator/(const Vector& a, const Vector& b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

// a * b + c, and c - a * b, each rounded once.
inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vector subtract_product(const Vector& c, const Vector& a, const Vector& b) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

// Where a or b is NaN, the result is b, as the instructions have it.
inline Vector max(const Vector& a, const Vector& b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Vector min(const Vector& a, const Vector& b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Vector abs(const Vector& a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
// The larger one of a and b, neither of which is negative. NaN is larger than every number.
inline __m256 max_magnitude(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline Vector max_magnitude(const Vector& a, const Vector& b) {
  return {max_magnitude(a.low, b.low), max_magnitude(a.high, b.high)};
}
inline Vector sqrt(const Vector& a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline Vector round_half_even(const Vector& a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}

// 2^n for a whole number n in -126 .. 127.
inline __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// Multiplies twice, by powers of two that are normal numbers, so that only the second product is rounded.
inline __m256 scale_by_power(__m256 a, __m256 n) {
  const __m256 limited = _mm256_max_ps(_mm256_min_ps(n, _mm256_set1_ps(252.0f)), _mm256_set1_ps(-252.0f));
  const __m256 half = _mm256_floor_ps(_mm256_mul_ps(limited, _mm256_set1_ps(0.5f)));
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_ps(limited, half)));
}

// a * 2^n for a whole number n. The result is 0 or Inf beyond the exponents of float32.
inline Vector scale_by_power(const Vector& a, const Vector& n) {
  return {scale_by_power(a.low, n.low), scale_by_power(a.high, n.high)};
}

// table[index] for whole numbers 0 .. 15. A gather of eight takes longer than two shuffles and a blend.
inline __m256 lookup(const float (&table)[16], __m256 index) {
  const __m256i i = _mm256_cvtps_epi32(index);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

inline Vector lookup(const float (&table)[16], const Vector& index) {
  return {lookup(table, index.low), lookup(table, index.high)};
}

// The first `count` lanes of a, and 0 in the other lanes.
inline Vector keep(const Vector& a, std::int64_t count) {
  const __m256i low = first(count), high = first(count - 8);
  return {_mm256_and_ps(a.low, _mm256_castsi256_ps(low)), _mm256_and_ps(a.high, _mm256_castsi256_ps(high))};
}

// Adds lanes that are 8 apart, then 4, 2 and 1.
inline float sum_of(const Vector& a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest_of(const Vector& a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The first `count` of 16 values from x[i] on, all of them if count is above 16, and 0 in the other lanes.
template <FloatType kType>
inline Vector load(const void* x, std::int64_t i, std::int64_t count = 16) {
  return {load_lanes<kType>(x, i, count), load_lanes<kType>(x, i + 8, count - 8)};
}

// 8 adjacent bf16. The load fills both halves of a register and one shuffle puts the values into the upper halves of the
// lanes, on a port that products do not need; widening and shifting are two instructions that compete with them.
inline __m256 widen_bf16(const std::uint16_t* halves) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                                          10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, places));
}

// 16 adjacent bf16 or f16.
template <FloatType kType>
inline Vector widen(const std::uint16_t* halves) {
  if constexpr (kType == FloatType::f16) return load<kType>(halves, 0);
  return {widen_bf16(halves), widen_bf16(halves + 8)};
}

template <FloatType kType>
inline void store(void* out, std::int64_t i, const Vector& a, std::int64_t count = 16) {
  store_lanes<kType>(out, i, count, a.low);
  store_lanes<kType>(out, i + 8, count - 8, a.high);
}

}  // namespace
}  // namespace octavo
