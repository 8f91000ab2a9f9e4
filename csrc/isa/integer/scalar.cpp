// SPDX-License-Identifier: Apache-2.0
// compile-flags:
// Plain C++: the executable definition of what every kernel does, and the kernel for CPUs that can run no other. Tests hold
// the other files of csrc/isa to this file bit for bit, and this file to python/octavo/reference.
#include <cmath>
#include <limits>

#include "contract/kernel.h"
#include "isa/common/half.h"

namespace octavo {
namespace {

void multiply_strip(const TileProduct& tile, const std::uint8_t* row, const std::int8_t* line, std::int32_t* acc) {
  std::memset(acc, 0, kStripColumns * sizeof(*acc));
  for (std::int64_t k = 0; k < tile.k_tiles * kTileK; k += kLineK, line += kLineBytes) {
    for (int column = 0; column < kStripColumns; ++column) {
      for (int i = 0; i < kLineK; ++i) acc[column] += row[k + i] * line[column * kLineK + i];
    }
  }
}

void multiply(const TileProduct& tile) {
  for (int i = 0; i < tile.m; ++i) {
    const auto* row = static_cast<const std::uint8_t*>(tile.rows) + i * tile.row_stride;
    for (int strip = 0; strip < tile.strip_count; ++strip) {
      multiply_strip(tile, row, tile.strips + strip * tile.strip_stride,
                     tile.acc + i * tile.acc_stride + strip * kStripColumns);
    }
  }
}

// The exact sum of one output, rounded once.
float rounded_sum(const Epilogue& e, int i, int j) {
  if (e.sums == Sums::wide) return static_cast<float>(e.wide[i * e.acc_stride + j]);
  const std::int64_t column_sum = e.column_sum[j];
  if (e.sums == Sums::plain) {
    return static_cast<float>(e.acc[i * e.acc_stride + j] - e.rows[i].zero_point * column_sum);
  }
  const std::int32_t* const planes = e.acc + 2 * i * e.acc_stride + j;
  return static_cast<float>(256 * (planes[0] - 128 * column_sum) + planes[e.acc_stride]);
}

void epilogue(const Epilogue& e) {
  for (int i = 0; i < e.m; ++i) {
    for (int j = 0; j < e.n; ++j) {
      const float scale = e.rows[i].scale * e.column_scale[j];
      store_float(e.out, e.type, i * e.out_stride + j,
                  std::fma(rounded_sum(e, i, j), scale, e.bias ? e.bias[j] : 0.0f));
    }
  }
}

float absmax(const void* x, FloatType type, std::int64_t count) {
  // Magnitudes are compared as integers, where NaN is larger than Inf and Inf larger than every finite value, so that neither
  // gets lost.
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = bits_of(load_float(x, type, i)) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  return float_of(largest);
}

RowRange min_max(const void* x, FloatType type, std::int64_t count) {
  RowRange range{0.0f, 0.0f};
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = load_float(x, type, i);
    finite = finite && std::isfinite(value);
    if (value < range.min) range.min = value;
    if (value > range.max) range.max = value;
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return finite ? range : RowRange{nan, nan};
}

// round_half_even(value * inverse_scale), limited to [low, high]. NaN becomes 0.
std::int32_t rounded(float value, float inverse_scale, std::int32_t low, std::int32_t high) {
  const float steps = value * inverse_scale;
  if (std::isnan(steps)) return 0;
  if (steps <= static_cast<float>(low)) return low;
  if (steps >= static_cast<float>(high)) return high;
  return static_cast<std::int32_t>(std::nearbyint(steps));
}

bool quantize_row(const QuantizeRow& row) {
  bool finite = true;
  for (std::int64_t i = 0; i < row.count; ++i) {
    const float value = load_float(row.x, row.type, i);
    const std::int32_t steps = rounded(value, row.inverse_scale, row.qmin - row.zero_point, row.qmax - row.zero_point);
    row.codes[i] = static_cast<std::uint8_t>(steps + row.zero_point);
    finite = finite && std::isfinite(value);
  }
  return finite;
}

void split_row(const SplitRow& row) {
  for (std::int64_t i = 0; i < row.count; ++i) {
    // A multiple of 256 is added, so that no negative number has to be shifted.
    const std::int32_t q = rounded(load_float(row.x, row.type, i), row.inverse_scale, -kMax16, kMax16) + 128 * 256;
    row.high[i] = static_cast<std::uint8_t>(q >> 8);
    row.low[i] = static_cast<std::uint8_t>(q & 255);
  }
}

void dequantize_row(const DequantizeRow& row) {
  for (std::int64_t i = 0; i < row.count; ++i) {
    const std::int32_t code = row.is_signed ? static_cast<std::int8_t>(row.codes[i]) : row.codes[i];
    store_float(row.out, row.type, i, row.scale * static_cast<float>(code - row.zero_point));
  }
}

}  // namespace

static constexpr Kernel make_table() {
  Kernel table{};
  table.name = "scalar";
  table.form = RowForm::u8;
  table.tile = {4, 1};
  table.multiply = multiply;
  table.epilogue = epilogue;
  table.absmax = absmax;
  table.min_max = min_max;
  table.quantize_row = quantize_row;
  table.split_row = split_row;
  table.dequantize_row = dequantize_row;
  return table;
}

extern constexpr Kernel kernel_scalar = make_table();

}  // namespace octavo
