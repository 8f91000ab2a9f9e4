// SPDX-License-Identifier: Apache-2.0
// A word holds two codes as int16, which vpmaddwd multiplies exactly. vpmaddubsw, on four codes of 8 bits, would saturate.
#pragma once

#include "isa/float/tile/tile.h"

namespace octavo {
namespace {

struct CodeWords {
  static constexpr int kPerWord = 2;

  struct MultiplyKeys {
    static void add(Vector& acc, const Vector& a, const Vector& b) {
      acc = {add_products(acc.low, a.low, b.low), add_products(acc.high, a.high, b.high)};
    }
  };
  using MultiplyWeights = MultiplyKeys;

  static Vector key_offset() { return set(0.0f); }
  static Vector as_keys(const Vector& words) { return words; }

  // 16 words of 32 successive numbers, which are rounded half to even.
  static Vector signed_words(const Vector (&parts)[2]) { return {in_order(parts[0]), in_order(parts[1])}; }
  static Vector unsigned_words(const Vector (&parts)[2]) { return signed_words(parts); }

  // 16 words. Word i holds number i of each row.
  static Vector stack(const Vector (&rows)[2]) {
    return {pair(rows[0].low, rows[1].low), pair(rows[0].high, rows[1].high)};
  }

  static Vector reals(const Vector& sums) {
    return {_mm256_cvtepi32_ps(_mm256_castps_si256(sums.low)), _mm256_cvtepi32_ps(_mm256_castps_si256(sums.high))};
  }

 private:
  static __m256 add_products(__m256 acc, __m256 a, __m256 b) {
    const __m256i products = _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(acc), products));
  }

  static __m256 in_order(const Vector& a) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    return _mm256_castsi256_ps(_mm256_permute4x64_epi64(words, 0xd8));
  }

  static __m256 pair(__m256 low, __m256 high) {
    const __m256i above = _mm256_slli_epi32(_mm256_cvtps_epi32(high), 16);
    return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_cvtps_epi32(low), above, 0xaa));
  }
};

}  // namespace
}  // namespace octavo
