// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c -mavxvnni
// vpdpbusd on ymm registers multiplies half a line (8 columns x 4 k) by 4 activation bytes. All functions but multiply are
// those in avx2.cpp.
#include <immintrin.h>

#include "contract/kernel.h"

// The tests compile this file once more with the EVEX encoding of vpdpbusd, for CPUs that have AVX512-VNNI but not AVX-VNNI.
#ifndef OCTAVO_VPDPBUSD
#define OCTAVO_VPDPBUSD "%{vex%} vpdpbusd"
#endif

namespace octavo {
namespace {

// Weights are prefetched this far ahead into the L2 cache. With weights from memory this is 1.2 to 1.3 times as fast for 4 and
// 6 rows as prefetching 2 KB ahead into the L1 cache (Zen 4, EVEX encoding). One row is faster without prefetches.
constexpr int kPrefetchBytes = 6144;
constexpr int kHalves = 2;

inline void dot(__m256i& acc, __m256i activations, __m256i half_line) {
  asm(OCTAVO_VPDPBUSD " %2, %1, %0" : "+x"(acc) : "x"(activations), "x"(half_line));
}

inline __m256i broadcast(const std::uint8_t* four_codes) {
  std::int32_t word;
  __builtin_memcpy(&word, four_codes, 4);
  return _mm256_set1_epi32(word);
}

// Few rows have too few accumulators to hide the latency of vpdpbusd. Each accumulator then becomes several partial sums.
constexpr int chains_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

template <int kRows>
void multiply_strip(const TileProduct& tile, int strip) {
  constexpr int kChains = chains_for(kRows);
  __m256i acc[kChains][kRows][kHalves];
  OCTAVO_UNROLL for (auto& chain : acc) {
    OCTAVO_UNROLL for (auto& row : chain) { OCTAVO_UNROLL for (auto& sum : row) sum = _mm256_setzero_si256(); }
  }
  const auto* codes = static_cast<const std::uint8_t*>(tile.rows);
  const std::int8_t* line = tile.strips + strip * tile.strip_stride;
  for (std::int64_t step = 0; step < tile.k_tiles * 4; ++step) {
    OCTAVO_UNROLL for (int l = 0; l < 4; ++l) {
      const std::int8_t* const at = line + l * kLineBytes;
      if (kRows > 1) _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes, _MM_HINT_T1);
      __m256i weights[kHalves];
      OCTAVO_UNROLL for (int h = 0; h < kHalves; ++h) {
        weights[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + h * 32));
      }
      OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m256i activations = broadcast(codes + r * tile.row_stride + l * kLineK);
        OCTAVO_UNROLL for (int h = 0; h < kHalves; ++h) dot(acc[l % kChains][r][h], activations, weights[h]);
      }
    }
    codes += 4 * kLineK;
    line += 4 * kLineBytes;
  }
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int h = 0; h < kHalves; ++h) {
      __m256i sum = acc[0][r][h];
      OCTAVO_UNROLL for (int c = 1; c < kChains; ++c) sum = _mm256_add_epi32(sum, acc[c][r][h]);
      std::int32_t* const out = tile.acc + r * tile.acc_stride + strip * kStripColumns + h * 8;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sum);
    }
  }
}

template <int kRows>
void multiply_rows(const TileProduct& tile) {
  for (int strip = 0; strip < tile.strip_count; ++strip) multiply_strip<kRows>(tile, strip);
}

void multiply(const TileProduct& tile) {
  switch (tile.m) {
    case 1: return multiply_rows<1>(tile);
    case 2: return multiply_rows<2>(tile);
    case 3: return multiply_rows<3>(tile);
    case 4: return multiply_rows<4>(tile);
    case 5: return multiply_rows<5>(tile);
    default: return multiply_rows<6>(tile);
  }
}

}  // namespace

extern const Kernel kernel_avx2;

static constexpr Kernel make_table() {
  Kernel table{};
  table.name = "avx_vnni";
  table.rank = 20;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c | kFeatureAvxVnni;
  table.base = &kernel_avx2;
  table.form = RowForm::u8;
  table.tile = {6, 1};  // 12 accumulators, 2 halves of a line and 1 broadcast in 16 registers
  table.multiply = multiply;
  return table;
}

extern constexpr Kernel kernel_avx_vnni = make_table();

}  // namespace octavo
