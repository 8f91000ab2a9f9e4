// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mamx-tile -mamx-int8
// tdpbusd multiplies 16 rows x 64 k of activations by a tile of the packed weight (64 k x 16 columns): 16,384 products at once.
//
// Of the 8 tile registers, 6 hold accumulators (3 blocks of rows x 2 strips), one holds activations A and one a weight tile B:
//
//              strip 0   strip 1
//   rows 0      tmm0      tmm1        The products of one tile of k have the order A0 B0, A0 B1, A1 B1, A1 B0, A2 B0, A2 B1,
//   rows 1      tmm2      tmm3        so that 6 products need 7 loads.
//   rows 2      tmm4      tmm5
//
// All blocks of rows have the same height. The last block starts early enough to end with the last row; rows that two blocks
// share are computed twice and give the same sums. So a call needs one tile configuration and no code for a remainder.
#include <immintrin.h>

#include "contract/kernel.h"

namespace octavo {
namespace {

constexpr int kTileHeight = 16;
constexpr int kRowBlocks = 3;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

thread_local int configured_height = 0;

// Accumulators and activations have `height` rows, a weight tile has 16 lines. Loading a configuration takes about 50 ns, so a
// configuration is kept until the height changes or the call ends.
void configure(int height) {
  if (height == configured_height) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = kLineBytes;
    config.rows[tile] = static_cast<std::uint8_t>(tile == 7 ? kTileHeight : height);
  }
  asm volatile("" ::: "memory");  // _tile_loadconfig does not tell the compiler that it reads all of config
  _tile_loadconfig(&config);
  configured_height = height;
}

// Tile registers must not stay in use after a call: the OS would save their 8 KB at each context switch.
void leave() {
  _tile_release();
  configured_height = 0;
}

template <int kBlocks, int kStrips>
void multiply_blocks(const TileProduct& tile, int height) {
  const auto* rows0 = static_cast<const std::uint8_t*>(tile.rows);
  const int row1 = kBlocks == 2 ? tile.m - height : height, row2 = tile.m - height;
  const std::uint8_t *rows1 = rows0 + row1 * tile.row_stride, *rows2 = rows0 + row2 * tile.row_stride;
  const std::int8_t *strip0 = tile.strips, *strip1 = tile.strips + tile.strip_stride;

  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (std::int64_t k_tile = 0; k_tile < tile.k_tiles; ++k_tile) {
    const std::ptrdiff_t at = k_tile * kTileK, weight_at = k_tile * kTileBytes;
    _tile_loadd(6, rows0 + at, tile.row_stride);
    _tile_loadd(7, strip0 + weight_at, kLineBytes);
    _tile_dpbusd(0, 6, 7);
    if constexpr (kStrips == 2) {
      _tile_loadd(7, strip1 + weight_at, kLineBytes);
      _tile_dpbusd(1, 6, 7);
    }
    if constexpr (kBlocks >= 2) {
      _tile_loadd(6, rows1 + at, tile.row_stride);
      if constexpr (kStrips == 2) {
        _tile_dpbusd(3, 6, 7);
        _tile_loadd(7, strip0 + weight_at, kLineBytes);
      }
      _tile_dpbusd(2, 6, 7);
    }
    if constexpr (kBlocks == 3) {
      _tile_loadd(6, rows2 + at, tile.row_stride);
      _tile_dpbusd(4, 6, 7);
      if constexpr (kStrips == 2) {
        _tile_loadd(7, strip1 + weight_at, kLineBytes);
        _tile_dpbusd(5, 6, 7);
      }
    }
  }

  const std::ptrdiff_t stride = tile.acc_stride * static_cast<std::ptrdiff_t>(sizeof(std::int32_t));
  std::int32_t *acc1 = tile.acc + row1 * tile.acc_stride, *acc2 = tile.acc + row2 * tile.acc_stride;
  _tile_stored(0, tile.acc, stride);
  if constexpr (kStrips == 2) _tile_stored(1, tile.acc + kStripColumns, stride);
  if constexpr (kBlocks >= 2) _tile_stored(2, acc1, stride);
  if constexpr (kBlocks >= 2 && kStrips == 2) _tile_stored(3, acc1 + kStripColumns, stride);
  if constexpr (kBlocks == 3) _tile_stored(4, acc2, stride);
  if constexpr (kBlocks == 3 && kStrips == 2) _tile_stored(5, acc2 + kStripColumns, stride);
}

template <int kBlocks>
void multiply_strips(const TileProduct& tile) {
  const int height = (tile.m + kBlocks - 1) / kBlocks;
  configure(height);
  tile.strip_count == 2 ? multiply_blocks<kBlocks, 2>(tile, height) : multiply_blocks<kBlocks, 1>(tile, height);
}

void multiply(const TileProduct& tile) {
  if (tile.m <= kTileHeight) return multiply_strips<1>(tile);
  if (tile.m <= 2 * kTileHeight) return multiply_strips<2>(tile);
  multiply_strips<kRowBlocks>(tile);
}

}  // namespace

extern const Kernel kernel_avx512_vnni;

static constexpr Kernel make_table() {
  Kernel table{};
  table.name = "amx_int8";
  table.rank = 40;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni |
                   kFeatureAmxTile | kFeatureAmxInt8;
  table.base = &kernel_avx512_vnni;
  table.form = RowForm::u8;
  table.tile = {kRowBlocks * kTileHeight, 2};
  table.min_rows = 3;  // a product takes as long for 1 row as for 8, so vpdpbusd wins at 1 and 2
  table.multiply = multiply;
  table.leave = leave;
  return table;
}

extern constexpr Kernel kernel_amx_int8 = make_table();

}  // namespace octavo
