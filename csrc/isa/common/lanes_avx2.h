// SPDX-License-Identifier: Apache-2.0
// Loads and stores up to 8 floats, which have any float type in memory and are float32 in one ymm register.
#pragma once

#include <immintrin.h>

#include "contract/kernel.h"

namespace octavo {
namespace {  // each file has its own copy, so that no code of another instruction set is linked in

// A mask of the first `count` of 8 lanes of 32 bits. A count above 8 means all lanes.
inline __m256i first(std::int64_t count) {
  const int lanes = count < 8 ? static_cast<int>(count) : 8;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m128i load_halves(const std::uint16_t* from, std::int64_t count) {
  if (count >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  std::uint16_t padded[8] = {};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(padded));
}

inline void store_halves(std::uint16_t* to, std::int64_t count, __m128i halves) {
  if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  std::uint16_t all[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), halves);
  for (std::int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// 8 values from x[i] on as float32. Lanes from `count` on are 0 and not read; `count` may be negative.
template <FloatType kType>
inline __m256 load_lanes(const void* x, std::int64_t i, std::int64_t count) {
  if constexpr (kType == FloatType::f32) {
    const float* const from = static_cast<const float*>(x) + i;
    return count >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first(count));
  } else {
    const __m128i halves = load_halves(static_cast<const std::uint16_t*>(x) + i, count);
    if constexpr (kType == FloatType::f16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
}

inline __m128i bf16_from_float(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Rounds the first `count` lanes to kType and stores them.
template <FloatType kType>
inline void store_lanes(void* out, std::int64_t i, std::int64_t count, __m256 value) {
  if constexpr (kType == FloatType::f32) {
    float* const to = static_cast<float*>(out) + i;
    count >= 8 ? _mm256_storeu_ps(to, value) : _mm256_maskstore_ps(to, first(count), value);
  } else {
    const __m128i halves = kType == FloatType::bf16
                               ? bf16_from_float(value)
                               : _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_halves(static_cast<std::uint16_t*>(out) + i, count, halves);
  }
}

}  // namespace
}  // namespace octavo
