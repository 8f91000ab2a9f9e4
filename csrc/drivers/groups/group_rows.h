// SPDX-License-Identifier: Apache-2.0
// Activation rows for weights in groups: signed codes, and for each segment of k the row's scale and the sum of the codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "contract/group_kernel.h"
#include "contract/kernel.h"
#include "drivers/quantize.h"
#include "group_linear.h"

namespace octavo {

// How a call cuts k, and in which form the kernel reads rows.
struct GroupCut {
  std::int64_t k, units;
  int segment_units;
  std::int64_t segments;
  GroupInput input;
  bool words;  // int16, and bytes otherwise

  std::int64_t padded_k() const { return units * kUnitK; }
  std::int64_t whole_tiles() const { return (padded_k() + kTileK - 1) / kTileK * kTileK; }
  std::int64_t segment_k() const { return std::int64_t{segment_units} * kUnitK; }
  bool planes() const { return input.bits == 16 && !words; }
  int rows_of_codes() const { return planes() ? 2 : 1; }
  // One line more than k needs, because rows whose distance is a power of two would share one set of the cache.
  std::int64_t row_stride() const { return (whole_tiles() + kTileK) * (words ? 2 : 1); }
};

// Where a row goes.
struct GroupRow {
  std::uint8_t* codes;    // as the kernel reads them
  float *scale, *sum;     // of the first segment; scale is only written if rows have groups
  std::int32_t* start;    // of the first segment
  std::ptrdiff_t stride;  // elements from one segment of these three to the next
  float* factor;
};

// One row of activations on its way to codes.
struct GroupRowQuantizer {
  const Kernel& kernel;
  const GroupKernel& group_kernel;
  const GroupCut& cut;
  std::int32_t offset;  // as the kernel's codes need it
  FloatType type;
  std::int8_t* bytes;   // memory for two rows of bytes, if rows become words
  std::int32_t* units;  // memory for the sums of two rows of units
  float* scales;        // memory for the scales of one row

  void quantize(const void* x, const GroupRow& row) const {
    std::int8_t* const codes = cut.words ? bytes : reinterpret_cast<std::int8_t*>(row.codes);
    const std::int64_t stride = cut.words ? cut.whole_tiles() : cut.row_stride();
    const int rows = cut.input.bits == 16 ? 2 : 1;
    for (int i = 0; i < rows; ++i) {  // to the end of the row: a kernel may read up to 3 units beyond the last k
      std::memset(codes + i * stride + cut.k, 0, static_cast<std::size_t>(stride - cut.k));
    }
    const bool finite = cut.input.bits == 16 ? split(x, codes, stride, row) : quantize_groups(x, codes, row);
    if (!finite) clear(codes, stride, rows, row);
    if (rows == 2) {
      to_signed_planes(codes, codes + stride);
      sum_segments(codes, codes + stride, row);
    } else {
      sum_segments(codes, nullptr, row);
    }
    if (cut.words) widen(codes, rows == 2 ? codes + stride : nullptr, reinterpret_cast<std::int16_t*>(row.codes));
  }

 private:
  static float scale_of(float absmax, std::int32_t qmax) {
    return row_qparams({0.0f, absmax}, {-qmax, qmax}, true).scale;
  }

  bool quantize_groups(const void* x, std::int8_t* codes, const GroupRow& row) const {
    if (!cut.input.group_size) {
      const float absmax = kernel.absmax(x, type, cut.k);
      if (!std::isfinite(absmax)) return false;
      *row.factor = scale_of(absmax, 127);
      kernel.quantize_row({x, type, cut.k, 1.0f / *row.factor, 0, -127, 127, reinterpret_cast<std::uint8_t*>(codes)});
      return true;
    }
    *row.factor = 1.0f;
    const std::int64_t groups = (cut.k + cut.input.group_size - 1) / cut.input.group_size;
    if (!group_kernel.quantize_groups({x, type, cut.k, cut.input.group_size, scales, codes})) return false;
    const std::int64_t in_group = cut.input.group_size / cut.segment_k();
    for (std::int64_t segment = 0; segment < cut.segments; ++segment) {
      row.scale[segment * row.stride] = scales[std::min(segment / in_group, groups - 1)];
    }
    return true;
  }

  bool split(const void* x, std::int8_t* codes, std::int64_t stride, const GroupRow& row) const {
    const float absmax = kernel.absmax(x, type, cut.k);
    if (!std::isfinite(absmax)) return false;
    const float scale = scale_of(absmax, kMax16);
    auto* const high = reinterpret_cast<std::uint8_t*>(codes);
    kernel.split_row({x, type, cut.k, 1.0f / scale, high, high + stride});
    *row.factor = scale;
    return true;
  }

  // Codes of a row that holds NaN or Inf: all 0, with scales that make its outputs NaN.
  void clear(std::int8_t* codes, std::int64_t stride, int rows, const GroupRow& row) const {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int i = 0; i < rows; ++i) {
      // The high bytes of split_row have 128 added to them.
      std::memset(codes + i * stride, rows == 2 && i == 0 ? 128 : 0, static_cast<std::size_t>(cut.k));
    }
    for (std::int64_t segment = 0; cut.input.group_size && segment < cut.segments; ++segment) {
      row.scale[segment * row.stride] = nan;
    }
    *row.factor = nan;
  }

  // 256 * (high - 128) + low, of unsigned bytes, becomes 256 * high + low of signed ones.
  void to_signed_planes(std::int8_t* high, std::int8_t* low) const {
    for (std::int64_t k = 0; k < cut.k; ++k) {
      const auto unsigned_high = static_cast<std::uint8_t>(high[k]), unsigned_low = static_cast<std::uint8_t>(low[k]);
      high[k] = static_cast<std::int8_t>(unsigned_high - 128 + (unsigned_low >> 7));
    }
  }

  void sum_segments(const std::int8_t* high, const std::int8_t* low, const GroupRow& row) const {
    group_kernel.sum_units(high, cut.units, units);
    if (low) {
      std::int32_t* const low_units = units + cut.units;
      group_kernel.sum_units(low, cut.units, low_units);
      for (std::int64_t i = 0; i < cut.units; ++i) units[i] = 256 * units[i] + low_units[i];
    }
    for (std::int64_t segment = 0; segment < cut.segments; ++segment) {
      const std::int64_t begin = segment * cut.segment_units, end = std::min(cut.units, begin + cut.segment_units);
      std::int32_t sum = 0;
      for (std::int64_t i = begin; i < end; ++i) sum += units[i];
      const std::ptrdiff_t at = segment * row.stride;
      row.start[at] = -offset * sum;
      row.sum[at] = cut.input.group_size ? row.scale[at] * static_cast<float>(sum) : static_cast<float>(sum);
    }
  }

  void widen(const std::int8_t* high, const std::int8_t* low, std::int16_t* out) const {
    for (std::int64_t k = 0; k < cut.padded_k(); ++k) {
      out[k] = static_cast<std::int16_t>(low ? 256 * high[k] + low[k] : high[k]);
    }
  }
};

}  // namespace octavo
