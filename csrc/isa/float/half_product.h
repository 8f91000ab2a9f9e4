// SPDX-License-Identifier: Apache-2.0
// Products of float32 rows and weights of 16-bit floats. A weight is widened in registers when it is loaded, which is exact, and
// multiplied and added in one fma: each output is one chain of sums in ascending order of k, whatever the tile. So the bits are
// the same on every instruction set, for every batch.
//
// A tile is some rows times some strips. Widening costs one instruction (two for f16) for as many products as the tile has
// rows, 8 % of the time of 12 rows on AVX512, and a panel of widened weights would cost more to write and to read.
#pragma once

#include "isa/float/tile/tile.h"

namespace octavo {
namespace {

constexpr int kHalfTileRows = tile_rows(1);

// Weights are prefetched so far ahead, for tiles that wait for memory and not for products.
constexpr int kHalfPrefetchBytes = 2048, kHalfPrefetchRows = 4;

// A power of two: 8 strips for a single row, because one chain of sums for each strip must hide the latency of fma, and fewer
// where the accumulators of more rows fill the registers.
constexpr int half_strips(int rows) {
  const int most = kTileVectors * tile_rows(kTileVectors) / rows;
  return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

template <FloatType kType, int kRows, int kStrips>
void multiply_half_tile(const HalfProduct& p, std::int64_t row, std::int64_t strip) {
  float* const sums = p.sums + row * p.sums_stride + strip * kStripColumns;
  const std::int64_t sums_stride = p.sums_stride, strip_stride = p.strip_stride;
  Vector acc[kRows][kStrips];
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
      acc[r][s] = load<FloatType::f32>(sums, r * sums_stride + s * kStripColumns);
    }
  }
  const std::uint16_t* line = p.strips + strip * strip_stride;
  const float* const begin = p.x + row * kHalfRowDistance;
  const float* const end = begin + p.k;
  for (const float* x = begin; x < end; ++x, line += kStripColumns) {
    Vector weights[kStrips];
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
      const std::uint16_t* const halves = line + s * strip_stride;
      if constexpr (kRows <= kHalfPrefetchRows) {
        __builtin_prefetch(reinterpret_cast<const char*>(halves) + kHalfPrefetchBytes);
      }
      weights[s] = widen<kType>(halves);
    }
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector value = set(x[r * kHalfRowDistance]);
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) add_product(acc[r][s], value, weights[s]);
    }
  }
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
      store<FloatType::f32>(sums, r * sums_stride + s * kStripColumns, acc[r][s]);
    }
  }
}

// The strips from `strip` on, as many as possible at a time.
template <FloatType kType, int kRows, int kStrips = half_strips(kRows)>
void multiply_half_strips(const HalfProduct& p, std::int64_t row, std::int64_t strip = 0) {
  for (; strip + kStrips <= p.strip_count; strip += kStrips) multiply_half_tile<kType, kRows, kStrips>(p, row, strip);
  if constexpr (kStrips > 1) multiply_half_strips<kType, kRows, kStrips / 2>(p, row, strip);
}

// multiply_half_strips for a number of rows that is known at run time only, 1 to kHalfTileRows.
template <FloatType kType, int kRows = kHalfTileRows>
void multiply_half_rows(const HalfProduct& p, std::int64_t row, std::int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_half_rows<kType, kRows - 1>(p, row, rows);
  }
  multiply_half_strips<kType, kRows>(p, row);
}

// Rows are dealt out evenly: 14 rows are 7 + 7 and not 12 + 2.
template <FloatType kType>
void multiply_half_tiles(const HalfProduct& p) {
  const std::int64_t tiles = (p.rows + kHalfTileRows - 1) / kHalfTileRows;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t row = tile * p.rows / tiles;
    multiply_half_rows<kType>(p, row, (tile + 1) * p.rows / tiles - row);
  }
}

inline void multiply_half(const HalfProduct& p) {
  if (p.type == FloatType::bf16) return multiply_half_tiles<FloatType::bf16>(p);
  multiply_half_tiles<FloatType::f16>(p);
}

}  // namespace
}  // namespace octavo
