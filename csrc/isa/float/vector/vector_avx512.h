// SPDX-License-Identifier: Apache-2.0
// 16 floats in one zmm register.
#pragma once

#include "contract/float_kernel.h"
#include "isa/common/lanes_avx512.h"

namespace octavo {
namespace {

struct Vector {
  __m512 lanes;
};

inline Vector set(float value) { return {_mm512_set1_ps(value)}; }
inline Vector operator+(const Vector& a, const Vector& b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Vector operator-(const Vector& a, const Vector& b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Vector operator*(const Vector& a, const Vector& b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
inline Vector operator/(const Vector& a, const Vector& b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }

// a * b + c, and c - a * b, each rounded once.
inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
  return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
}
inline Vector subtract_product(const Vector& c, const Vector& a, const Vector& b) {
  return {_mm512_fnmadd_ps(a.lanes, b.lanes, c.lanes)};
}

// Where a or b is NaN, the result is b, as the instructions have it.
inline Vector max(const Vector& a, const Vector& b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
inline Vector min(const Vector& a, const Vector& b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
inline Vector abs(const Vector& a) { return {_mm512_abs_ps(a.lanes)}; }
// The larger one of a and b, neither of which is negative. NaN is larger than every number.
inline Vector max_magnitude(const Vector& a, const Vector& b) {
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.lanes), _mm512_castps_si512(b.lanes)))};
}
inline Vector sqrt(const Vector& a) { return {_mm512_sqrt_ps(a.lanes)}; }
inline Vector round_half_even(const Vector& a) {
  return {_mm512_roundscale_ps(a.lanes, _MM_FROUND_TO_NEAREST_INT | 8)};
}

// a * 2^n for a whole number n. The result is 0 or Inf beyond the exponents of float32.
inline Vector scale_by_power(const Vector& a, const Vector& n) { return {_mm512_scalef_ps(a.lanes, n.lanes)}; }

// table[index] for whole numbers 0 .. 15.
inline Vector lookup(const float (&table)[16], const Vector& index) {
  return {_mm512_permutexvar_ps(_mm512_cvtps_epi32(index.lanes), _mm512_load_ps(table))};
}

// The first `count` lanes of a, and 0 in the other lanes.
inline Vector keep(const Vector& a, std::int64_t count) { return {_mm512_maskz_mov_ps(first(count), a.lanes)}; }

// Adds lanes that are 8 apart, then 4, 2 and 1.
inline float sum_of(const Vector& a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.lanes), _mm512_extractf32x8_ps(a.lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest_of(const Vector& a) { return _mm512_reduce_max_ps(a.lanes); }

// The first `count` of 16 values from x[i] on, all of them if count is above 16, and 0 in the other lanes.
template <FloatType kType>
inline Vector load(const void* x, std::int64_t i, std::int64_t count = 16) {
  return {load_lanes<kType>(x, i, first(count))};
}

// 16 adjacent bf16 or f16. One shuffle puts bf16 into the upper halves of the lanes, where widening and shifting are two
// instructions.
template <FloatType kType>
inline Vector widen(const std::uint16_t* halves) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
  if constexpr (kType == FloatType::f16) return {_mm512_cvtph_ps(words)};
  alignas(64) static constexpr std::uint16_t kPlaces[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                            0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(kPlaces), _mm512_castsi256_si512(words)))};
}

template <FloatType kType>
inline void store(void* out, std::int64_t i, const Vector& a, std::int64_t count = 16) {
  store_lanes<kType>(out, i, first(count), a.lanes);
}

}  // namespace
}  // namespace octavo
