// SPDX-License-Identifier: Apache-2.0
// A call takes its activation rows a block at a time: it quantizes them into scratch memory, then walks the output tiles of
// the block. The int32 accumulators of a tile stay on the stack until the epilogue has turned them into outputs.
//
// Weight-only layers use the same integer kernels. Their activation rows have 16 bits: kernels that read bytes multiply the
// high bytes and the low bytes as two rows, kernels that read int16 multiply the rows as they are, a stretch of k at a time.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/memory.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "isa/common/prefetch.h"
#include "pack.h"
#include "registry/registry.h"
#include "row.h"
#include "tiles.h"

namespace octavo {
namespace {

constexpr std::int64_t kScratchBytes = 1000000;  // of codes in one block of rows: they stay in the L2 cache

// The calling thread's memory: the codes of a block of rows, which all threads read; the scales and zero points of these
// rows; column sums that contain an integer bias.
thread_local Scratch block_scratch, qparams_scratch, bias_scratch;
// Each thread's memory: one row on its way from bytes to int16.
thread_local Scratch row_scratch;

// Joins the two bytes of 16-bit codes. The high byte is stored with 128 added to it.
void join_row(const std::uint8_t* high, const std::uint8_t* low, std::int64_t count, std::int16_t* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<std::int16_t>((high[i] - 128) * 256 + low[i]);
}

// Calls fill(row, codes, distance) for the activation rows [0, count), pads their codes with zeros and brings them into the
// kernel's form, in parallel. A 16-bit row is filled as two rows of bytes whose first bytes lie `distance` apart.
template <class Fill>
const std::uint8_t* fill_rows(const RowBlock& block, std::int64_t count, const Fill& fill) {
  const std::int64_t stride = block.stride(), padded_k = block.padded_k();
  const int filled_rows = block.is_16_bit ? 2 : 1;
  const bool to_int16 = block.kernel.form == RowForm::s16;
  std::uint8_t* const rows = block_scratch.get(count * block.planes() * stride);
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 15) / std::max<std::int64_t>(block.k, 1));
  parallel(count, grain, [&](std::int64_t begin, std::int64_t end) {
    std::uint8_t* const bytes = to_int16 ? row_scratch.get(filled_rows * padded_k) : nullptr;
    const std::int64_t distance = to_int16 ? padded_k : stride;
    for (std::int64_t i = begin; i < end; ++i) {
      std::uint8_t* const out = rows + i * block.planes() * stride;
      std::uint8_t* const codes = to_int16 ? bytes : out;
      fill(i, codes, distance);
      for (int row = 0; row < filled_rows; ++row) {
        std::memset(codes + row * distance + block.k, 0, static_cast<std::size_t>(padded_k - block.k));
      }
      auto* const wide = reinterpret_cast<std::int16_t*>(out);
      if (to_int16 && block.is_16_bit) join_row(codes, codes + distance, padded_k, wide);
      if (to_int16 && !block.is_16_bit) block.kernel.widen_row(codes, padded_k, wide);
    }
  });
  return rows;
}

// The sums of a tile where k is too long for int32: stretches of k have exact sums, which are added up, corrected and joined
// in double.
void multiply_wide(const Walk& walk, const OutputTile& tile, const Epilogue& e, double* sums) {
  const RowBlock& block = walk.block;
  const std::int64_t stretch = block.exact_k() / kTileK * kTileK, padded_k = block.padded_k();
  const std::int64_t values = tile.m * block.planes() * e.acc_stride;
  std::int32_t acc[kMaxTileOutputs];
  std::fill_n(sums, values, 0.0);
  for (std::int64_t at = 0; at < padded_k; at += stretch) {
    multiply(walk, tile, at, std::min(stretch, padded_k - at), acc);
    for (std::int64_t i = 0; i < values; ++i) sums[i] += acc[i];
  }
  for (int i = 0; i < tile.m; ++i) {
    const double* const from = sums + i * block.planes() * e.acc_stride;
    double* const to = sums + i * e.acc_stride;  // at or before `from`
    for (int j = 0; j < tile.columns; ++j) {
      const double column_sum = e.column_sum[j];
      to[j] = block.planes() == 2 ? 256 * (from[j] - 128 * column_sum) + from[e.acc_stride + j]
                                  : from[j] - e.rows[i].zero_point * column_sum;
    }
  }
}

// Fetches the cache lines that the epilogue will write, a whole product ahead. Without this, stores that miss the cache fill
// the store queue and the next tile waits for it: 8 % at 1024 x 1536 x 384 on Zen 4.
void prefetch_output(const Epilogue& e) {
  const std::int64_t row_bytes = e.out_stride * bytes_of(e.type), bytes = e.n * bytes_of(e.type);
  for (int i = 0; i < e.m; ++i) {
    const char* const row = static_cast<const char*>(e.out) + i * row_bytes;
    for (std::int64_t at = 0; at < bytes; at += kLineBytes) prefetch_to_write(row + at);
  }
}

// Multiplies a tile and writes its outputs. `e` lacks only the sums.
void finish_tile(const Walk& walk, const OutputTile& tile, Epilogue& e) {
  if (walk.block.k > walk.block.exact_k()) {
    double sums[kMaxTileOutputs];
    multiply_wide(walk, tile, e, sums);
    e.sums = Sums::wide;
    e.wide = sums;
    return walk.block.kernel.epilogue(e);
  }
  const Kernel& kernel = walk.block.kernel;
  e.sums = walk.block.planes() == 2 ? Sums::planes : Sums::plain;
  if (kernel.multiply_to_float && e.sums == Sums::plain && e.type == FloatType::f32) {
    return kernel.multiply_to_float(product_of(walk, tile, 0, walk.block.padded_k(), nullptr), e);
  }
  prefetch_output(e);
  std::int32_t acc[kMaxTileOutputs];
  multiply(walk, tile, 0, walk.block.padded_k(), acc);
  e.acc = acc;
  kernel.epilogue(e);
}

// Kernels with large tiles, such as AMX, are wasted on very few rows: their base takes such calls.
const Kernel& kernel_for(std::int64_t rows) {
  const Kernel* kernel = &active_kernel();
  while (kernel->base && rows < kernel->min_rows) kernel = kernel->base;
  return *kernel;
}

// For 8-bit rows.
const Kernel& kernel_for(std::int64_t rows, const PackedWeight& weight) {
  const Kernel& kernel = kernel_for(rows);
  return kernel.byte_kernel && weight.words.offsets ? *kernel.byte_kernel : kernel;
}

// The activation function is applied to a tile while the tile is in the L1 cache, and in float32, so that each output is
// rounded to its type once.
void finish_active_tile(const Walk& walk, const OutputTile& tile, Epilogue& e, Activation activation) {
  float reals[kMaxTileOutputs];
  Activate a{activation, e.out, e.out_stride, FloatType::f32, e.m, e.n, e.out, e.out_stride, e.type};
  if (e.type != FloatType::f32) {
    a.x = e.out = reals;
    a.x_stride = e.out_stride = e.n;
    e.type = FloatType::f32;
  }
  finish_tile(walk, tile, e);
  active_float_kernel().activate(a);
}

// A block of rows times all of the weight. `out` begins with the outputs of the block's first row.
void multiply_block(const Walk& walk, const PackedWeight& weight, const RowQParams* qparams, Output out) {
  const std::int64_t out_bytes = bytes_of(out.type);
  for_each_output_tile(walk, [&](const OutputTile& tile) {
    Epilogue e{};
    e.acc_stride = std::ptrdiff_t{tile.strips()} * kStripColumns;
    e.m = tile.m;
    e.n = tile.columns;
    e.rows = qparams + tile.row;
    e.column_sum = weight.column_sum + tile.column;
    e.column_scale = weight.scale + tile.column;
    e.bias = weight.bias ? weight.bias + tile.column : nullptr;
    e.out = static_cast<char*>(out.data) + (tile.row * weight.n + tile.column) * out_bytes;
    e.out_stride = weight.n;
    e.type = out.type;
    if (out.activation == Activation::none) return finish_tile(walk, tile, e);
    finish_active_tile(walk, tile, e, out.activation);
  });
}

RowQParams* qparams_of_rows(std::int64_t count) {
  const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(RowQParams));
  return reinterpret_cast<RowQParams*>(qparams_scratch.get(bytes));
}

// `out` from the outputs of row `first` on.
Output from_row(Output out, std::int64_t first, std::int64_t n) {
  out.data = static_cast<char*>(out.data) + first * n * bytes_of(out.type);
  return out;
}

// Activation rows from `first` on as codes in the kernel's form. Their scales and zero points go to `qparams`.
const std::uint8_t* quantize_rows(const RowBlock& block, const Activations& x, std::int64_t first, std::int64_t count,
                                  const RowQuantization& quantization, RowQParams* qparams) {
  const std::int64_t row_bytes = block.k * bytes_of(x.type);
  const char* const data = static_cast<const char*>(x.data) + first * row_bytes;
  return fill_rows(block, count, [&](std::int64_t i, std::uint8_t* codes, std::int64_t distance) {
    const Row row{block.kernel, data + i * row_bytes, x.type, block.k, codes, distance};
    qparams[i] = row.quantize(quantization);
  });
}

// Rows of codes in the kernel's form.
const std::uint8_t* copy_rows(const RowBlock& block, const std::uint8_t* codes, std::int64_t stride,
                              std::int64_t count) {
  return fill_rows(block, count, [&](std::int64_t i, std::uint8_t* row, std::int64_t) {
    std::memcpy(row, codes + i * stride, static_cast<std::size_t>(block.k));
  });
}

void linear(const Activations& x, const PackedWeight& weight, const RowQuantization& quantization, Output out) {
  if (x.m == 0 || weight.n == 0) return;
  const bool is_16_bit = quantization.is_16_bit();
  const RowBlock block{is_16_bit ? kernel_for(x.m) : kernel_for(x.m, weight), weight.k, is_16_bit};
  const std::int64_t rows_in_block = block.rows_within(kScratchBytes, x.m);
  RowQParams* const qparams = qparams_of_rows(rows_in_block);
  for (std::int64_t first = 0; first < x.m; first += rows_in_block) {
    const std::int64_t count = std::min(rows_in_block, x.m - first);
    const std::uint8_t* const rows = quantize_rows(block, x, first, count, quantization, qparams);
    const Walk walk{block, rows, block.stride(), count, weight.strips, weight.n, weight.words};
    multiply_block(walk, weight, qparams, from_row(out, first, weight.n));
  }
}

// The epilogue subtracts zero_point * column_sum from each sum. Where all rows have the same zero point, an integer bias can
// be part of what is subtracted: the column sums become zero_point * column_sum - bias, and the factor becomes 1. Neither
// the epilogue nor the instruction sets know of the bias.
PackedWeight with_bias_in_column_sums(const PackedWeight& weight, std::int32_t zero_point) {
  const std::int64_t room = std::numeric_limits<std::int32_t>::max() - saturating_product({255 * 128, weight.k});
  auto* const column_sum =
      reinterpret_cast<std::int32_t*>(bias_scratch.get(weight.n * static_cast<std::int64_t>(sizeof(std::int32_t))));
  std::int64_t largest = 0;
  for (std::int64_t j = 0; j < weight.n; ++j) {
    const std::int64_t bias = weight.integer_bias[j];
    largest = std::max(largest, std::abs(bias));
    column_sum[j] = static_cast<std::int32_t>(zero_point * std::int64_t{weight.column_sum[j]} - bias);
  }
  require(largest <= room, "linear_static: the largest value of an int32 bias is ", largest,
          ", but int32 sums over k = ", weight.k, " leave room for ", room, "; use a float bias");
  PackedWeight result = weight;
  result.column_sum = column_sum;
  return result;
}

// The outputs of one tile of int8_mm, exact.
void write_integers(const Walk& walk, const OutputTile& tile, std::int32_t zero_point, const std::int32_t* column_sum,
                    std::int32_t* c) {
  std::int32_t acc[kMaxTileOutputs];
  multiply(walk, tile, 0, walk.block.padded_k(), acc);
  for (int i = 0; i < tile.m; ++i) {
    const std::int32_t* const sums = acc + i * tile.strips() * kStripColumns;
    std::int32_t* const row = c + (tile.row + i) * walk.n + tile.column;
    for (int j = 0; j < tile.columns; ++j) row[j] = sums[j] - zero_point * column_sum[tile.column + j];
  }
}

}  // namespace

void linear_dynamic(const Activations& x, const PackedWeight& weight, bool symmetric, Output out) {
  linear(x, weight, {symmetric ? RowQuantization::Kind::symmetric : RowQuantization::Kind::affine}, out);
}

void linear_static(const Activations& x, const PackedWeight& weight, RowQParams input, Output out) {
  const RowQParams unsigned_input{input.scale, input.zero_point + 128};
  RowQuantization quantization{RowQuantization::Kind::fixed, unsigned_input, unsigned_input.zero_point};
  if (!weight.integer_bias) return linear(x, weight, quantization, out);
  quantization.column_sum_factor = 1;
  linear(x, with_bias_in_column_sums(weight, unsigned_input.zero_point), quantization, out);
}

void linear_weight_only(const Activations& x, const PackedWeight& weight, Output out) {
  linear(x, weight, {RowQuantization::Kind::to_16_bits}, out);
}

void linear_codes(const CodedActivations& x, const PackedWeight& weight, Output out) {
  if (x.m == 0 || weight.n == 0) return;
  const RowBlock block{kernel_for(x.m, weight), weight.k, false};
  const bool in_place = block.kernel.form == RowForm::u8 && weight.k == block.padded_k();
  const std::int64_t rows_in_block = block.rows_within(kScratchBytes, x.m);
  RowQParams* const qparams = qparams_of_rows(rows_in_block);
  for (std::int64_t first = 0; first < x.m; first += rows_in_block) {
    const std::int64_t count = std::min(rows_in_block, x.m - first);
    const std::uint8_t* const codes = x.codes + first * x.stride;
    for (std::int64_t i = 0; i < count; ++i) qparams[i] = {x.scale[first + i], 128};
    Walk walk{block, codes, x.stride, count, weight.strips, weight.n, weight.words};
    if (!in_place) {
      walk.rows = copy_rows(block, codes, x.stride, count);
      walk.stride = block.stride();
    }
    multiply_block(walk, weight, qparams, from_row(out, first, weight.n));
  }
}

void int8_mm(const IntegerProduct& product) {
  const std::int64_t k = product.k, n = product.n;
  require(k <= kMaxExactK, "int8_mm: k is ", k, ", but int32 sums are exact only up to k = ", kMaxExactK,
          "; split k and add the parts in int64");
  if (product.m == 0 || n == 0) return;
  std::vector<std::int8_t> strips = zeros<std::int8_t>(packed_bytes(n, k), "int8_mm: b, packed,");
  std::vector<std::int32_t> column_sum = zeros<std::int32_t>(n, "int8_mm: a sum of each column");
  pack_weight(product.b, n, k, 1, n, strips.data(), column_sum.data());

  const RowBlock block{kernel_for(product.m), k, false};
  const std::int64_t rows_in_block = block.rows_within(kScratchBytes, product.m);
  const std::uint8_t flip = product.a_is_signed ? 0x80 : 0;  // int8 + 128 is a uint8 with zero point 128
  const std::int32_t zero_point = product.a_is_signed ? 128 : 0;
  for (std::int64_t first = 0; first < product.m; first += rows_in_block) {
    const std::int64_t count = std::min(rows_in_block, product.m - first);
    const auto* const a = static_cast<const std::uint8_t*>(product.a) + first * k;
    const auto* const rows = fill_rows(block, count, [&](std::int64_t i, std::uint8_t* codes, std::int64_t) {
      for (std::int64_t j = 0; j < k; ++j) codes[j] = a[i * k + j] ^ flip;
    });
    const Walk walk{block, rows, block.stride(), count, strips.data(), n};
    for_each_output_tile(walk, [&](const OutputTile& tile) {
      write_integers(walk, tile, zero_point, column_sum.data(), product.c + first * n);
    });
  }
}

}  // namespace octavo
