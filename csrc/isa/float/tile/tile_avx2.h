// SPDX-License-Identifier: Apache-2.0
// Tiles have 12 ymm accumulators.
#pragma once

#include "isa/float/vector/vector_avx2.h"

namespace octavo {
namespace {

constexpr int kTileVectors = 1;
constexpr int tile_rows(int) { return 6; }

inline void add_product(Vector& acc, const Vector& a, const Vector& b) { acc = multiply_add(a, b, acc); }

// score + bias, but -Inf where bias is -Inf, whatever the score is.
inline __m256 add_bias(__m256 score, __m256 bias) {
  const __m256 hidden = _mm256_cmp_ps(bias, _mm256_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
  return _mm256_blendv_ps(_mm256_add_ps(score, bias), bias, hidden);
}
inline Vector add_bias(const Vector& score, const Vector& bias) {
  return {add_bias(score.low, bias.low), add_bias(score.high, bias.high)};
}

inline __m256 bias_of_bytes(__m128i bytes) {
  const __m256i hidden = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
  return _mm256_and_ps(_mm256_castsi256_ps(hidden), _mm256_set1_ps(-__builtin_inff()));
}

// 0 in lanes where the byte of mask[i ...] is not 0, otherwise -Inf. Lanes from `count` on are -Inf.
inline Vector bias_of_bytes(const void* mask, std::int64_t i, std::int64_t count) {
  const unsigned char* from = static_cast<const unsigned char*>(mask) + i;
  unsigned char padded[16] = {};
  if (count < 16) {
    for (std::int64_t lane = 0; lane < count; ++lane) padded[lane] = from[lane];
    from = padded;
  }
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {bias_of_bytes(bytes), bias_of_bytes(_mm_srli_si128(bytes, 8))};
}

inline void transpose(__m256 (&rows)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x20);
    rows[j + 4] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x31);
  }
}

// Exchanges lane j of rows[i] and lane i of rows[j].
inline void transpose(Vector (&rows)[16]) {
  __m256 top[8], right[8], bottom[8], left[8];
  for (int i = 0; i < 8; ++i) {
    top[i] = rows[i].low;
    right[i] = rows[i].high;
    left[i] = rows[i + 8].low;
    bottom[i] = rows[i + 8].high;
  }
  transpose(top);
  transpose(right);
  transpose(left);
  transpose(bottom);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {top[i], left[i]};
    rows[i + 8] = {right[i], bottom[i]};
  }
}

}  // namespace
}  // namespace octavo
