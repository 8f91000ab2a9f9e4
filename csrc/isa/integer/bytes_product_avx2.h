// SPDX-License-Identifier: Apache-2.0
// The product of bytes on AVX2, for weights whose saturating words are listed (contract/layout.h).
//
// vpmaddubsw multiplies half a line (8 columns x 4 k) by 4 activations and adds two products in int16, vpmaddwd by ones adds
// two such sums in int32. The first sum saturates in the listed words, and only there. Afterwards each of these words is
// multiplied once more, by all rows at once, and what its sums have lost is added.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "contract/kernel.h"

namespace octavo {
namespace {

// Weights are prefetched this far ahead into the L2 cache. With weights from memory this is 1.4 times as fast for 4 rows, and
// 1.04 times for 64, as prefetching 2 KB ahead into the L1 cache (Zen 4).
constexpr int kPrefetchBytes = 6144;
constexpr int kHalves = 2;

// One asm statement for three instructions, because g++ 12 otherwise moves accumulators through the stack.
inline void dot_bytes(__m256i& acc, __m256i activations, __m256i half_line, __m256i ones) {
  __m256i sums;
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(sums)
      : "x"(activations), "x"(half_line), "x"(ones));
}

inline std::int32_t word_at(const void* bytes) {
  std::int32_t word;
  std::memcpy(&word, bytes, kLineK);
  return word;
}

template <int kRows>
void multiply_saturating(const TileProduct& tile, int strip) {
  __m256i acc[kRows][kHalves];
  OCTAVO_UNROLL for (auto& row : acc) { OCTAVO_UNROLL for (auto& sum : row) sum = _mm256_setzero_si256(); }
  const __m256i ones = _mm256_set1_epi16(1);
  const auto* codes = static_cast<const std::uint8_t*>(tile.rows);
  const std::int8_t* line = tile.strips + strip * tile.strip_stride;
  for (std::int64_t step = 0; step < tile.k_tiles * 4; ++step) {
    OCTAVO_UNROLL for (int l = 0; l < 4; ++l) {
      _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T1);
      __m256i weights[kHalves];
      OCTAVO_UNROLL for (int h = 0; h < kHalves; ++h) {
        weights[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + h * 32));
      }
      OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m256i activations = _mm256_set1_epi32(word_at(codes + r * tile.row_stride));
        OCTAVO_UNROLL for (int h = 0; h < kHalves; ++h) dot_bytes(acc[r][h], activations, weights[h], ones);
      }
      codes += kLineK;
      line += kLineBytes;
    }
  }
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int h = 0; h < kHalves; ++h) {
      std::int32_t* const out = tile.acc + r * tile.acc_stride + strip * kStripColumns + h * 8;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), acc[r][h]);
    }
  }
}

// Four activations of each row, in one 32-bit lane for each row.
template <int kRows>
inline __m256i gathered_words(const std::uint8_t* row, std::ptrdiff_t stride) {
  __m128i low = _mm_cvtsi32_si128(word_at(row)), high = _mm_setzero_si128();
  if constexpr (kRows > 1) low = _mm_insert_epi32(low, word_at(row + stride), 1);
  if constexpr (kRows > 2) low = _mm_insert_epi32(low, word_at(row + 2 * stride), 2);
  if constexpr (kRows > 3) low = _mm_insert_epi32(low, word_at(row + 3 * stride), 3);
  if constexpr (kRows > 4) high = _mm_cvtsi32_si128(word_at(row + 4 * stride));
  if constexpr (kRows > 5) high = _mm_insert_epi32(high, word_at(row + 5 * stride), 1);
  return kRows > 4 ? _mm256_set_m128i(high, low) : _mm256_zextsi128_si256(low);
}

// What two sums of vpmaddubsw have lost, for each row: the exact sum, which wraps around, less the saturated one.
inline __m256i lost_sums(__m256i activations, __m256i codes) {
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_maddubs_epi16(activations, _mm256_and_si256(codes, low_bytes));
  const __m256i odd = _mm256_maddubs_epi16(activations, _mm256_andnot_si256(low_bytes, codes));
  const __m256i lost = _mm256_sub_epi16(_mm256_add_epi16(even, odd), _mm256_adds_epi16(even, odd));
  return _mm256_madd_epi16(lost, _mm256_set1_epi16(1));
}

// Adds to the sums of a strip what its listed words have lost.
template <int kRows>
void add_lost(const TileProduct& tile, int strip) {
  const std::uint16_t* const first = tile.words.words + tile.words.offsets[strip];
  const std::uint16_t* const end = tile.words.words + tile.words.offsets[strip + 1];
  if (first == end) return;
  const auto* const rows = static_cast<const std::uint8_t*>(tile.rows);
  const std::int8_t* const codes = tile.strips + strip * tile.strip_stride;
  const std::int64_t last = tile.k_tiles * (kTileBytes / kLineK) - 1;
  std::int32_t* const acc = tile.acc + strip * kStripColumns;
  alignas(32) std::int32_t lost[kStripColumns][8];
  if constexpr (kRows > 1) std::memset(lost, 0, sizeof lost);
  for (const std::uint16_t* listed = first; listed != end; ++listed) {
    const std::int64_t word = std::min<std::int64_t>(*listed, last), column = word % kStripColumns;
    const __m256i activations = gathered_words<kRows>(rows + word / kStripColumns * kLineK, tile.row_stride);
    const __m256i more = lost_sums(activations, _mm256_set1_epi32(word_at(codes + word * kLineK)));
    if constexpr (kRows == 1) {
      acc[column] += _mm256_cvtsi256_si32(more);
    } else {
      auto* const sums = reinterpret_cast<__m256i*>(lost[column]);
      _mm256_store_si256(sums, _mm256_add_epi32(_mm256_load_si256(sums), more));
    }
  }
  if constexpr (kRows > 1) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kStripColumns; ++j) acc[r * tile.acc_stride + j] += lost[j][r];
    }
  }
}

template <int kRows>
void multiply_bytes_of(const TileProduct& tile) {
  for (int strip = 0; strip < tile.strip_count; ++strip) {
    multiply_saturating<kRows>(tile, strip);
    add_lost<kRows>(tile, strip);
  }
}

void multiply_bytes(const TileProduct& tile) {
  switch (tile.m) {
    case 1: return multiply_bytes_of<1>(tile);
    case 2: return multiply_bytes_of<2>(tile);
    case 3: return multiply_bytes_of<3>(tile);
    case 4: return multiply_bytes_of<4>(tile);
    case 5: return multiply_bytes_of<5>(tile);
    default: return multiply_bytes_of<6>(tile);
  }
}

}  // namespace
}  // namespace octavo
