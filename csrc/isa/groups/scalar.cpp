// SPDX-License-Identifier: Apache-2.0
// compile-flags:
// Plain C++: the executable definition of the product of groups. Tests hold the other files of csrc/isa/groups to this file
// bit for bit, and this file to python/octavo/reference.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "contract/group_kernel.h"
#include "isa/common/group_numbers.h"

namespace octavo {
namespace {

// The code of one weight in a block of `bits` lines: line `line` of 8, byte `byte` of 64.
int code_in_block(const std::uint8_t* block, int bits, int line, int byte) {
  const auto at = [&](int row) { return block[row * kLineBytes + byte]; };
  if (bits == 3) {  // 3 bytes hold 8 codes: three in each byte, and the last two bits of each are the third one's
    if (line % 3 != 2) return at(line / 3) >> (line % 3 * 3) & 7;
    const int low = at(line / 3) >> 6 & 3;
    return low | (at(2) >> (line == 2 ? 6 : 7) & 1) << 2;
  }
  int code = 0, shift = 0, first = 0;
  for (const int width : {4, 2, 1}) {
    if (!(bits & width)) continue;
    const int in_byte = 8 / width;
    code |= (at(first + line / in_byte) >> (line % in_byte * width) & ((1 << width) - 1)) << shift;
    shift += width;
    first += width;
  }
  return code;
}

// u of column `column` and k, of the strip that begins at `strip`.
int unsigned_code(const GroupCodes& codes, const std::uint8_t* strip, std::int64_t k, int column) {
  const int byte = column * kLineK + static_cast<int>(k % kLineK);
  if (codes.bits == 0 || codes.bits == 8) {
    return strip[k / kLineK * kLineBytes + byte] ^ (codes.bits == 8 ? 128 : 0);
  }
  const std::uint8_t* const block = strip + k / kBlockK * codes.bits * kLineBytes;
  const int code = code_in_block(block, codes.bits, static_cast<int>(k % kBlockK) / kLineK, byte);
  return codes.table ? codes.table[code] : code;
}

// The exact sum of row i and one column over the units `begin` .. `end`.
std::int32_t sum_of(const GroupProduct& p, int i, const std::uint8_t* strip, int column, std::int64_t begin,
                    std::int64_t end) {
  const auto* const rows = static_cast<const char*>(p.rows);
  const auto* const high = reinterpret_cast<const std::int8_t*>(rows + (p.planes ? 2 * i : i) * p.row_stride);
  std::int32_t sum = 0;
  for (std::int64_t k = begin * kUnitK; k < end * kUnitK; ++k) {
    const int activation = p.planes ? 256 * high[k] + high[p.row_stride + k] : high[k];
    sum += activation * unsigned_code(p.codes, strip, k, column);
  }
  return sum;
}

float output(const GroupProduct& p, int i, int strip, int column) {
  const std::uint8_t* const codes = p.codes.strips + strip * p.codes.strip_stride;
  float sum = 0.0f;
  std::int64_t segment = 0;
  for (std::int64_t unit = 0; unit < p.units; unit += p.segment_units, ++segment) {
    const std::int64_t end = std::min<std::int64_t>(unit + p.segment_units, p.units),
                       at = segment * p.segment_stride + i;
    const auto t = static_cast<float>(p.row_start[at] + sum_of(p, i, codes, column, unit, end));
    const ScaleAndMinimum weight = scale_of(p.scales, strip, segment / p.group_segments, column);
    sum = p.row_scale ? std::fma(t * weight.scale, p.row_scale[at], sum) : std::fma(t, weight.scale, sum);
    if (p.scales.minimum_type != Number::none) sum = std::fma(weight.minimum, p.row_sum[at], sum);
  }
  const int j = strip * kStripColumns + column;
  const float factor = p.column_scale ? p.row_factor[i] * p.column_scale[j] : p.row_factor[i];
  return std::fma(sum, factor, p.bias ? p.bias[j] : 0.0f);
}

void multiply(const GroupProduct& p) {
  for (int i = 0; i < p.m; ++i) {
    for (int j = 0; j < p.n; ++j) {
      store_float(p.out, p.type, i * p.out_stride + j, output(p, i, j / kStripColumns, j % kStripColumns));
    }
  }
}

void unpack_strip(const UnpackStrip& u) {
  for (std::int64_t k = 0; k < u.units * kUnitK; ++k) {
    for (int column = 0; column < kStripColumns; ++column) {
      u.lines[k / kLineK * kLineBytes + column * kLineK + k % kLineK] =
          static_cast<std::uint8_t>(unsigned_code(u.codes, u.codes.strips, k, column) - u.lowered_by);
    }
  }
}

bool quantize_groups(const QuantizeGroups& q) {
  for (std::int64_t begin = 0; begin < q.count; begin += q.group) {
    const std::int64_t end = std::min(q.count, begin + q.group);
    float absmax = 0.0f;
    for (std::int64_t i = begin; i < end; ++i) {
      const float magnitude = std::fabs(load_float(q.x, q.type, i));
      if (!std::isfinite(magnitude)) return false;
      absmax = std::max(absmax, magnitude);
    }
    const float scale = absmax / 127.0f >= FLT_MIN ? absmax / 127.0f : 1.0f, inverse = 1.0f / scale;
    q.scale[begin / q.group] = scale;
    for (std::int64_t i = begin; i < end; ++i) {
      const float steps = std::nearbyint(load_float(q.x, q.type, i) * inverse);
      q.codes[i] = static_cast<std::int8_t>(std::max(-127.0f, std::min(127.0f, steps)));
    }
  }
  return true;
}

void sum_units(const std::int8_t* codes, std::int64_t units, std::int32_t* sums) {
  for (std::int64_t i = 0; i < units; ++i) {
    sums[i] = 0;
    for (int k = 0; k < kUnitK; ++k) sums[i] += codes[i * kUnitK + k];
  }
}

}  // namespace

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "scalar";
  table.largest_byte_code = 255;
  table.rows = table.rows_of_planes = 4;
  table.panel_rows = 4;
  table.panel_rows_of_bytes = 4;
  table.multiply = multiply;
  table.unpack_strip = unpack_strip;
  table.quantize_groups = quantize_groups;
  table.sum_units = sum_units;
  return table;
}

extern constexpr GroupKernel group_kernel_scalar = make_table();

}  // namespace octavo
