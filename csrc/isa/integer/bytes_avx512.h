// SPDX-License-Identifier: Apache-2.0
// What rows.h needs beyond a Vector: numbers within bounds, and 64 whole numbers as bytes.
#pragma once

#include "isa/float/vector/vector_avx512.h"

namespace octavo {
namespace {

// a within [low, high], and 0 where a is NaN.
inline Vector bounded(const Vector& a, const Vector& low, const Vector& high) {
  const __mmask16 number = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_ORD_Q);
  return {_mm512_min_ps(_mm512_maskz_max_ps(number, a.lanes, low.lanes), high.lanes)};
}

// The largest lane of a, all of whose lanes are magnitudes. NaN is larger than Inf.
inline float largest_magnitude(const Vector& a) {
  const std::int32_t largest = _mm512_reduce_max_epi32(_mm512_castps_si512(a.lanes));
  float result;
  __builtin_memcpy(&result, &largest, 4);
  return result;
}

// 64 integers of 16 bits: the numbers of 4 Vectors, rounded half to even. Packing changes their
// order, and store_bytes restores it.
struct Words64 {
  explicit Words64(const Vector (&numbers)[4]) {
    OCTAVO_UNROLL for (int v = 0; v < 2; ++v) {
      words[v] =
          _mm512_packs_epi32(_mm512_cvtps_epi32(numbers[2 * v].lanes), _mm512_cvtps_epi32(numbers[2 * v + 1].lanes));
    }
  }

  Words64& operator+=(std::int32_t number) {
    OCTAVO_UNROLL for (auto& w : words) w = _mm512_add_epi16(w, _mm512_set1_epi16(static_cast<short>(number)));
    return *this;
  }
  Words64& operator>>=(int bits) {
    OCTAVO_UNROLL for (auto& w : words) w = _mm512_srai_epi16(w, static_cast<unsigned>(bits));
    return *this;
  }

  Words64 low_bytes() const {
    Words64 bytes = *this;
    OCTAVO_UNROLL for (auto& w : bytes.words) w = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
    return bytes;
  }

  // Words 0 .. 255 as bytes, in the order of the numbers.
  void store_bytes(std::uint8_t* to) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words[0], words[1])));
  }

  __m512i words[2];
};

// code - zero_point for `count` codes, at most 16.
inline Vector load_steps(const std::uint8_t* codes, std::int64_t count, bool is_signed, std::int32_t zero_point) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first(count), codes);
  const __m512i code = is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(zero_point)))};
}

}  // namespace
}  // namespace octavo
