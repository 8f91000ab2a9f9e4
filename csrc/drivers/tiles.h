// SPDX-License-Identifier: Apache-2.0
// How the outputs of a product are cut into tiles (some activation rows times some packed strips), in which order a thread
// takes tiles, and how threads share them out. linear.cpp says what happens in a tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/parallel.h"
#include "contract/kernel.h"
#include "pack.h"

namespace octavo {

constexpr std::int64_t kSerialWork =
    1000000;                                // so few multiply-adds (5 to 12 us) do not pay for waking a second thread
constexpr std::int64_t kRowsToSplit = 128;  // with at least this many rows for each thread, threads share out rows
constexpr std::int64_t kPanelBytes = 256 << 10;  // weights that stay in the L2 cache while rows go by
constexpr std::int64_t kCachedBytes = 1 << 20;   // weights of at most this size stay in the L2 cache from call to call

// How many codes lie between the beginnings of two activation rows: one line more than k needs, because rows whose distance
// is a power of two would share one set of the cache.
constexpr std::int64_t row_distance(std::int64_t k) { return ceil_divide(k, kTileK) * kTileK + kTileK; }

// A block of activation rows as a kernel reads them.
struct RowBlock {
  const Kernel& kernel;
  std::int64_t k;
  bool is_16_bit;

  // A 16-bit row becomes two rows of 8 bits, unless the kernel multiplies int16.
  int planes() const { return is_16_bit && kernel.form == RowForm::u8 ? 2 : 1; }

  std::int64_t code_bytes() const { return kernel.form == RowForm::s16 ? 2 : 1; }
  std::int64_t padded_k() const { return ceil_divide(k, kTileK) * kTileK; }

  // The longest k for which sums fit int32.
  std::int64_t exact_k() const { return is_16_bit && kernel.form == RowForm::s16 ? kMaxExactK16 : kMaxExactK; }

  // Bytes from one row to the next.
  std::int64_t stride() const { return row_distance(k) * code_bytes(); }

  // How many of m rows to take at a time, so that their codes fit `bytes`. All blocks have nearly the same size, and none is
  // smaller than a tile.
  std::int64_t rows_within(std::int64_t bytes, std::int64_t m) const {
    const std::int64_t most = std::max<std::int64_t>(kernel.tile.rows, bytes / (stride() * planes()));
    return ceil_divide(m, ceil_divide(m, most));
  }
};

// A block of rows times all strips of a weight.
struct Walk {
  const RowBlock& block;
  const std::uint8_t* rows;
  std::int64_t stride;  // bytes from one row to the next
  std::int64_t count;   // activation rows
  const std::int8_t* strips;
  std::int64_t n;
  SaturatingWords words = {};

  // Whether the weight is too large to stay in the L2 cache from call to call.
  bool is_cold() const { return n * block.padded_k() > kCachedBytes; }

  std::int64_t row_tiles(TileShape shape) const { return ceil_divide(count, shape.rows / block.planes()); }
};

// The kernel's tall tile, if weights do not stay in the L2 cache and tall tiles read them fewer times.
inline TileShape tile_shape(const Walk& walk) {
  const Kernel& kernel = walk.block.kernel;
  if (kernel.tall_tile.rows == 0 || !walk.is_cold()) return kernel.tile;
  return walk.row_tiles(kernel.tall_tile) < walk.row_tiles(kernel.tile) ? kernel.tall_tile : kernel.tile;
}

struct Range {
  std::int64_t begin, end;
};

struct OutputTile {
  std::int64_t row;  // first activation row
  int m;             // activation rows
  std::int64_t column;
  int columns;

  int strips() const { return static_cast<int>(ceil_divide(columns, kStripColumns)); }
};

// All tiles of a product. Rows are dealt out evenly: a kernel with tiles of 6 rows takes 8 rows as 4 + 4, not as 6 + 2.
struct Grid {
  const Walk& walk;
  TileShape shape = tile_shape(walk);
  std::int64_t tile_columns = std::int64_t{shape.strips} * kStripColumns;
  std::int64_t row_tiles = walk.row_tiles(shape);
  std::int64_t column_tiles = ceil_divide(walk.n, tile_columns);

  Range rows(std::int64_t row_tile) const {
    return {row_tile * walk.count / row_tiles, (row_tile + 1) * walk.count / row_tiles};
  }

  OutputTile tile(Range rows, std::int64_t column_tile) const {
    const std::int64_t column = column_tile * tile_columns;
    const std::int64_t columns = std::min(tile_columns, walk.n - column);
    return {rows.begin, static_cast<int>(rows.end - rows.begin), column, static_cast<int>(columns)};
  }

  std::int64_t panel_tiles() const {
    const std::int64_t tile_bytes = tile_columns * walk.block.padded_k();
    return std::max<std::int64_t>(1, kPanelBytes / std::max<std::int64_t>(1, tile_bytes));
  }
};

// Calls f(tile) for these tiles of rows and of columns: for all rows of a panel of columns, then for the next panel. Weights
// then come from the L2 cache and outputs are written in long runs. Taking one column of tiles after the other was 12 %
// slower at 1024 x 1536 x 384.
template <class F>
void walk_tiles(const Grid& grid, Range rows, Range columns, const F& f) {
  const std::int64_t panel_tiles = grid.panel_tiles();
  for (std::int64_t panel = columns.begin; panel < columns.end; panel += panel_tiles) {
    const std::int64_t panel_end = std::min(columns.end, panel + panel_tiles);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const Range tile_rows = grid.rows(row);
      for (std::int64_t column = panel; column < panel_end; ++column) f(grid.tile(tile_rows, column));
    }
  }
  const Kernel& kernel = grid.walk.block.kernel;
  if (kernel.leave) kernel.leave();
}

// Calls f(tile) for all tiles, in parallel. Threads share out the rows if there are many, and otherwise the columns.
template <class F>
void for_each_output_tile(const Walk& walk, const F& f) {
  const Grid grid{walk};
  const Range all_rows{0, grid.row_tiles}, all_columns{0, grid.column_tiles};
  const std::int64_t work = std::max<std::int64_t>(1, walk.count * walk.block.planes() * walk.n * walk.block.k);
  const auto grain = [&](std::int64_t tiles) { return std::max<std::int64_t>(1, tiles * kSerialWork / work); };
  if (walk.count >= kRowsToSplit * thread_count()) {
    parallel(grid.row_tiles, grain(grid.row_tiles),
             [&](auto begin, auto end) { walk_tiles(grid, {begin, end}, all_columns, f); });
  } else {
    parallel(grid.column_tiles, grain(grid.column_tiles),
             [&](auto begin, auto end) { walk_tiles(grid, all_rows, {begin, end}, f); });
  }
}

// The product of one tile over k = first_k .. first_k + length, which are multiples of kTileK. Each row of `acc` has whole
// strips.
inline TileProduct product_of(const Walk& walk, const OutputTile& tile, std::int64_t first_k, std::int64_t length,
                              std::int32_t* acc) {
  const RowBlock& block = walk.block;
  const std::int64_t strip_stride = block.padded_k() * kStripColumns;
  TileProduct product;
  product.rows = walk.rows + tile.row * block.planes() * walk.stride + first_k * block.code_bytes();
  product.row_stride = walk.stride;
  product.strips = walk.strips + tile.column / kStripColumns * strip_stride + first_k * kStripColumns;
  product.strip_stride = strip_stride;
  product.k_tiles = length / kTileK;
  product.m = tile.m * block.planes();
  product.strip_count = tile.strips();
  product.cold = walk.is_cold();
  product.acc = acc;
  product.acc_stride = std::ptrdiff_t{tile.strips()} * kStripColumns;
  if (walk.words.offsets) product.words = {walk.words.offsets + tile.column / kStripColumns, walk.words.words};
  return product;
}

inline void multiply(const Walk& walk, const OutputTile& tile, std::int64_t first_k, std::int64_t length,
                     std::int32_t* acc) {
  walk.block.kernel.multiply(product_of(walk, tile, first_k, length, acc));
}

}  // namespace octavo
