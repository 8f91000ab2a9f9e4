// SPDX-License-Identifier: Apache-2.0
// What rows.h needs beyond a Vector: numbers within bounds, and 64 whole numbers as bytes.
#pragma once

#include "isa/float/vector/vector_avx2.h"

namespace octavo {
namespace {

// a within [low, high], and 0 where a is NaN.
inline __m256 bounded(__m256 a, __m256 low, __m256 high) {
  const __m256 number = _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q));
  return _mm256_min_ps(_mm256_max_ps(number, low), high);
}
inline Vector bounded(const Vector& a, const Vector& low, const Vector& high) {
  return {bounded(a.low, low.low, high.low), bounded(a.high, low.high, high.high)};
}

// The largest lane of a, all of whose lanes are magnitudes. NaN is larger than Inf.
inline float largest_magnitude(const Vector& a) {
  std::int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_castps_si256(max_magnitude(a.low, a.high)));
  std::int32_t largest = lanes[0];
  for (int i = 1; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  float result;
  __builtin_memcpy(&result, &largest, 4);
  return result;
}

// 64 integers of 16 bits: the numbers of 4 Vectors, rounded half to even. Packing changes their
// order, and store_bytes restores it.
struct Words64 {
  explicit Words64(const Vector (&numbers)[4]) {
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) {
      words[v] = _mm256_packs_epi32(_mm256_cvtps_epi32(numbers[v].low), _mm256_cvtps_epi32(numbers[v].high));
    }
  }

  Words64& operator+=(std::int32_t number) {
    OCTAVO_UNROLL for (auto& w : words) w = _mm256_add_epi16(w, _mm256_set1_epi16(static_cast<short>(number)));
    return *this;
  }
  Words64& operator>>=(int bits) {
    OCTAVO_UNROLL for (auto& w : words) w = _mm256_srai_epi16(w, bits);
    return *this;
  }

  Words64 low_bytes() const {
    Words64 bytes = *this;
    OCTAVO_UNROLL for (auto& w : bytes.words) w = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
    return bytes;
  }

  // Words 0 .. 255 as bytes, in the order of the numbers.
  void store_bytes(std::uint8_t* to) const {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    OCTAVO_UNROLL for (int v = 0; v < 4; v += 2) {
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words[v], words[v + 1]), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * v), bytes);
    }
  }

  __m256i words[4];
};

// code - zero_point for `count` codes, at most 16.
inline Vector load_steps(const std::uint8_t* codes, std::int64_t count, bool is_signed, std::int32_t zero_point) {
  std::uint8_t padded[16] = {};
  if (count < 16) {
    for (std::int64_t i = 0; i < count; ++i) padded[i] = codes[i];
    codes = padded;
  }
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const auto steps = [&](__m128i eight) {
    const __m256i code = is_signed ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(zero_point)));
  };
  return {steps(bytes), steps(_mm_srli_si128(bytes, 8))};
}

}  // namespace
}  // namespace octavo
