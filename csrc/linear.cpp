// SPDX-License-Identifier: Apache-2.0
// One call: quantize a block of activation rows into scratch, then walk the tiles of (rows x strips); a tile's int32
// accumulators stay on the stack until the epilogue has turned them into output.
//
// Weight-only layers use the same integer kernels: an activation row becomes two rows of 8 bits, high bytes and low
// bytes, and the epilogue joins their accumulators.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "pack.h"
#include "parallel.h"
#include "quantize.h"

namespace octavo {
namespace {

constexpr std::int64_t kSerialWork = 1 << 21;     // multiply-adds that do not pay for waking a second thread
constexpr std::int64_t kRowsToSplit = 128;        // with this many rows for each thread, threads share out rows
constexpr std::int64_t kPanelBytes = 256 << 10;   // weights that stay in the L2 cache while rows go by
constexpr std::int64_t kScratchBytes = 16 << 20;  // activation codes of one block of rows
constexpr std::int64_t kExactK = kMaxExactK / kTileK * kTileK;

// Memory of one thread that only grows. Calls do not nest, so one buffer for each purpose is enough.
class Scratch {
 public:
  std::uint8_t* get(std::size_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(kLineBytes, ceil_divide(bytes, 4096) * 4096)));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(std::uint8_t* data) const { std::free(data); }
  };
  std::unique_ptr<std::uint8_t, Free> data_;
  std::size_t size_ = 0;
};

thread_local Scratch block_scratch;    // of the caller: the codes of a block of rows, read by all threads
thread_local Scratch qparams_scratch;  // of the caller: their scales and zero points
thread_local Scratch row_scratch;      // of each thread: one row on its way to int16

// A block of activation rows as the kernel reads them. `per_row` is 2 where each activation row makes two planes.
struct RowBlock {
  const Kernel& kernel;
  std::int64_t k;
  int per_row;

  std::int64_t padded_k() const { return ceil_divide(k, kTileK) * kTileK; }

  // One line more than k needs: rows whose distance is a power of two would share one cache set.
  std::int64_t stride() const { return (padded_k() + kTileK) * (kernel.form == RowForm::s16 ? 2 : 1); }

  std::int64_t rows_within(std::int64_t bytes) const {
    return std::max<std::int64_t>(kernel.tile_rows, bytes / (stride() * per_row));
  }
};

// Calls fill(row, codes, distance between planes) for activation rows [0, count) and pads, in parallel.
template <class Fill>
const std::uint8_t* fill_rows(const RowBlock& block, std::int64_t count, const Fill& fill) {
  const std::int64_t stride = block.stride(), padded_k = block.padded_k();
  std::uint8_t* const rows = block_scratch.get(static_cast<std::size_t>(count * block.per_row * stride));
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 15) / std::max<std::int64_t>(block.k, 1));
  parallel(count, grain, [&](std::int64_t begin, std::int64_t end) {
    const bool widen = block.kernel.form == RowForm::s16;
    std::uint8_t* const codes = widen ? row_scratch.get(static_cast<std::size_t>(2 * padded_k)) : nullptr;
    for (std::int64_t i = begin; i < end; ++i) {
      std::uint8_t* const out = rows + i * block.per_row * stride;
      std::uint8_t* const first = widen ? codes : out;
      const std::int64_t distance = widen ? padded_k : stride;
      fill(i, first, distance);
      for (int plane = 0; plane < block.per_row; ++plane) {
        std::uint8_t* const row = first + plane * distance;
        std::memset(row + block.k, 0, static_cast<std::size_t>(padded_k - block.k));
        if (widen) block.kernel.widen_row(row, padded_k, reinterpret_cast<std::int16_t*>(out + plane * stride));
      }
    }
  });
  return rows;
}

// The product of a block of rows and all strips, tile by tile.
struct Walk {
  const RowBlock& block;
  const std::uint8_t* rows;
  std::int64_t count;  // activation rows
  const std::int8_t* strips;
  std::int64_t n;
};

struct Tile {
  std::int64_t row;  // first activation row
  int m;             // activation rows
  std::int64_t column;
  int columns;
};

// How the product is cut into tiles. Rows are dealt out evenly: 8 rows on a 6-row kernel are 4 + 4, not 6 + 2.
struct Grid {
  const Walk& walk;
  std::int64_t tile_columns = std::int64_t{walk.block.kernel.tile_strips} * kStripColumns;
  std::int64_t row_tiles = ceil_divide(walk.count, std::max(1, walk.block.kernel.tile_rows / walk.block.per_row));
  std::int64_t column_tiles = ceil_divide(walk.n, tile_columns);

  Tile tile(std::int64_t row_tile, std::int64_t column_tile) const {
    const std::int64_t row = row_tile * walk.count / row_tiles, end = (row_tile + 1) * walk.count / row_tiles;
    const std::int64_t column = column_tile * tile_columns;
    return {row, static_cast<int>(end - row), column, static_cast<int>(std::min(tile_columns, walk.n - column))};
  }

  std::int64_t panel_tiles() const {
    const std::int64_t tile_bytes = tile_columns * walk.block.padded_k();
    return std::max<std::int64_t>(1, kPanelBytes / std::max<std::int64_t>(1, tile_bytes));
  }
};

struct Range {
  std::int64_t begin, end;
};

// Calls f(tile) for tiles of these rows and columns: all rows for a panel of columns, then the next panel. Weights then
// come from the L2 cache and outputs are written in long runs (column by column: 12 % slower at 1024 x 1536 x 384).
template <class F>
void walk_tiles(const Grid& grid, Range rows, Range columns, const F& f) {
  const std::int64_t panel_tiles = grid.panel_tiles();
  for (std::int64_t panel = columns.begin; panel < columns.end; panel += panel_tiles) {
    const std::int64_t panel_end = std::min(columns.end, panel + panel_tiles);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      for (std::int64_t column = panel; column < panel_end; ++column) f(grid.tile(row, column));
    }
  }
  const Kernel& kernel = grid.walk.block.kernel;
  if (kernel.leave) kernel.leave();
}

// The same for all tiles, in parallel: many rows are shared out by rows, few by columns.
template <class F>
void for_each_tile(const Walk& walk, const F& f) {
  const Grid grid{walk};
  const Range all_rows{0, grid.row_tiles}, all_columns{0, grid.column_tiles};
  const std::int64_t work = std::max<std::int64_t>(1, walk.count * walk.block.per_row * walk.n * walk.block.k);
  const auto grain = [&](std::int64_t tiles) { return std::max<std::int64_t>(1, tiles * kSerialWork / work); };
  if (walk.count >= kRowsToSplit * thread_count()) {
    parallel(grid.row_tiles, grain(grid.row_tiles),
             [&](auto begin, auto end) { walk_tiles(grid, {begin, end}, all_columns, f); });
  } else {
    parallel(grid.column_tiles, grain(grid.column_tiles),
             [&](auto begin, auto end) { walk_tiles(grid, all_rows, {begin, end}, f); });
  }
}

// Accumulators of `tile` over k in [first_k, first_k + length), both multiples of a tile's k.
void multiply(const Walk& walk, const Tile& tile, std::int64_t first_k, std::int64_t length, std::int32_t* acc) {
  const RowBlock& block = walk.block;
  const std::int64_t strip_stride = block.padded_k() * kStripColumns;
  TileProduct product;
  product.rows =
      walk.rows + tile.row * block.per_row * block.stride() + first_k * (block.kernel.form == RowForm::s16 ? 2 : 1);
  product.row_stride = block.stride();
  product.strips = walk.strips + tile.column / kStripColumns * strip_stride + first_k * kStripColumns;
  product.strip_stride = strip_stride;
  product.k_tiles = length / kTileK;
  product.m = tile.m * block.per_row;
  product.strip_count = static_cast<int>(ceil_divide(tile.columns, kStripColumns));
  product.acc = acc;
  product.acc_stride = static_cast<std::ptrdiff_t>(product.strip_count) * kStripColumns;
  block.kernel.multiply(product);
}

Epilogue epilogue_of(const Walk& walk, const Tile& tile, const PackedWeight& weight, const RowQParams* qparams) {
  Epilogue e{};
  e.acc_stride = ceil_divide(tile.columns, kStripColumns) * kStripColumns;
  e.m = tile.m;
  e.n = tile.columns;
  e.planes = walk.block.per_row == 2;
  e.rows = qparams + tile.row;
  e.column_sum = weight.column_sum + tile.column;
  e.column_scale = weight.scale + tile.column;
  e.bias = weight.bias ? weight.bias + tile.column : nullptr;
  e.out_stride = weight.n;
  return e;
}

// k beyond what int32 holds exactly: the parts are exact, and their sum is kept in int64. Rare, so not fast.
void finish_wide(const Walk& walk, const Tile& tile, Epilogue e) {
  const Kernel* scalar = &walk.block.kernel;
  while (scalar->base) scalar = scalar->base;
  std::int32_t acc[kMaxTileOutputs];
  std::int64_t wide[kMaxTileOutputs] = {};
  const std::int64_t padded_k = walk.block.padded_k(), values = tile.m * walk.block.per_row * e.acc_stride;
  for (std::int64_t at = 0; at < padded_k; at += kExactK) {
    multiply(walk, tile, at, std::min(kExactK, padded_k - at), acc);
    for (std::int64_t i = 0; i < values; ++i) wide[i] += acc[i];
  }
  e.wide = wide;
  scalar->epilogue(e);
}

std::size_t bytes_of(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

enum class RowCodes { symmetric, affine, planes };

// Quantizes one row into `codes`; a row that is not finite gets scale NaN, which makes its outputs NaN.
RowQParams quantize_row(const Kernel& kernel, const void* x, FloatType type, std::int64_t k, RowCodes form,
                        std::uint8_t* codes, std::int64_t distance) {
  RowRange range{};
  if (form == RowCodes::affine) {
    range = kernel.min_max(x, type, k);
  } else {
    range.max = kernel.absmax(x, type, k);
  }
  if (!std::isfinite(range.max)) {
    std::memset(codes, 0, static_cast<std::size_t>(k));
    if (form == RowCodes::planes) std::memset(codes + distance, 0, static_cast<std::size_t>(k));
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  }
  if (form == RowCodes::planes) {
    const RowQParams qparams = row_qparams(range, {-kPlaneMax, kPlaneMax}, true);
    kernel.split_row({x, type, k, 1.0f / qparams.scale, codes, codes + distance});
    return qparams;
  }
  const CodeRange codes_range{form == RowCodes::symmetric ? 1 : 0, 255};
  const RowQParams qparams = row_qparams(range, codes_range, form == RowCodes::symmetric);
  kernel.quantize_row(
      {x, type, k, 1.0f / qparams.scale, qparams.zero_point, codes_range.qmin, codes_range.qmax, codes});
  return qparams;
}

// AMX-like kernels are wasted on very few rows; their base takes those calls.
const Kernel& kernel_for(std::int64_t rows) {
  const Kernel* kernel = &active_kernel();
  while (kernel->base && rows < kernel->min_rows) kernel = kernel->base;
  return *kernel;
}

void linear(const Activations& x, const PackedWeight& weight, RowCodes form, void* out) {
  if (x.m == 0 || weight.n == 0) return;
  const int per_row = form == RowCodes::planes ? 2 : 1;
  const RowBlock block{kernel_for(x.m * per_row), weight.k, per_row};
  const std::int64_t rows_in_block = std::min(x.m, block.rows_within(kScratchBytes));
  auto* const qparams =
      reinterpret_cast<RowQParams*>(qparams_scratch.get(static_cast<std::size_t>(rows_in_block) * sizeof(RowQParams)));
  const std::int64_t x_row = weight.k * static_cast<std::int64_t>(bytes_of(x.type));
  const std::int64_t out_row = weight.n * static_cast<std::int64_t>(bytes_of(x.type));

  for (std::int64_t first = 0; first < x.m; first += rows_in_block) {
    const std::int64_t count = std::min(rows_in_block, x.m - first);
    const char* const data = static_cast<const char*>(x.data) + first * x_row;
    char* const block_out = static_cast<char*>(out) + first * out_row;
    const std::uint8_t* const rows =
        fill_rows(block, count, [&](std::int64_t i, std::uint8_t* codes, std::int64_t distance) {
          qparams[i] = quantize_row(block.kernel, data + i * x_row, x.type, weight.k, form, codes, distance);
        });
    const Walk walk{block, rows, count, weight.strips, weight.n};
    for_each_tile(walk, [&](const Tile& tile) {
      Epilogue e = epilogue_of(walk, tile, weight, qparams);
      e.type = x.type;
      e.out = block_out + tile.row * out_row + tile.column * static_cast<std::int64_t>(bytes_of(x.type));
      if (weight.k > kMaxExactK) return finish_wide(walk, tile, e);
      std::int32_t acc[kMaxTileOutputs];
      multiply(walk, tile, 0, block.padded_k(), acc);
      e.acc = acc;
      block.kernel.epilogue(e);
    });
  }
}

}  // namespace

void linear_dynamic(const Activations& x, const PackedWeight& weight, bool symmetric, void* out) {
  linear(x, weight, symmetric ? RowCodes::symmetric : RowCodes::affine, out);
}

void linear_weight_only(const Activations& x, const PackedWeight& weight, void* out) {
  linear(x, weight, RowCodes::planes, out);
}

void int8_mm(const IntegerProduct& product) {
  const std::int64_t k = product.k, n = product.n;
  require(k <= kMaxExactK, "int8_mm: k is ", k, ", but int32 sums are exact only up to k = ", kMaxExactK,
          "; split k and add the parts in int64");
  if (product.m == 0 || n == 0) return;
  std::vector<std::int8_t> strips(static_cast<std::size_t>(packed_bytes(n, k)));
  std::vector<std::int32_t> column_sum(static_cast<std::size_t>(n));
  pack_weight(product.b, n, k, 1, n, strips.data(), column_sum.data());

  const RowBlock block{kernel_for(product.m), k, 1};
  const std::int64_t rows_in_block = std::min(product.m, block.rows_within(kScratchBytes));
  const std::uint8_t flip = product.a_is_signed ? 0x80 : 0;  // int8 + 128 is a uint8 with zero point 128
  const std::int32_t zero_point = product.a_is_signed ? 128 : 0;
  for (std::int64_t first = 0; first < product.m; first += rows_in_block) {
    const std::int64_t count = std::min(rows_in_block, product.m - first);
    const auto* const a = static_cast<const std::uint8_t*>(product.a) + first * k;
    const std::uint8_t* const rows = fill_rows(block, count, [&](std::int64_t i, std::uint8_t* codes, std::int64_t) {
      for (std::int64_t j = 0; j < k; ++j) codes[j] = a[i * k + j] ^ flip;
    });
    const Walk walk{block, rows, count, strips.data(), n};
    for_each_tile(walk, [&](const Tile& tile) {
      std::int32_t acc[kMaxTileOutputs];
      multiply(walk, tile, 0, block.padded_k(), acc);
      const std::int64_t stride = ceil_divide(tile.columns, kStripColumns) * kStripColumns;
      for (int i = 0; i < tile.m; ++i) {
        std::int32_t* const c = product.c + (first + tile.row + i) * n + tile.column;
        for (int j = 0; j < tile.columns; ++j) {
          c[j] = acc[i * stride + j] - zero_point * column_sum[static_cast<std::size_t>(tile.column + j)];
        }
      }
    });
  }
}

}  // namespace octavo
