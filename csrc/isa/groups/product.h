// SPDX-License-Identifier: Apache-2.0
// The product of groups over the Line, Four and Sums of an instruction set that adds products of bytes in int32.
//
// A tile keeps its int32 sums of a segment and its float32 outputs in registers. At the end of a segment the sums become
// floats and are added to the outputs: one conversion, one or two multiplications and one addition for each output.
#pragma once

#include "codes.h"
#include "scales.h"

namespace octavo {
namespace {

template <int kStrips>
struct SegmentScales {
  Vector scale[kStrips], minimum[kStrips];
};

// Adds the sums of one segment to the outputs of a tile.
template <int kRows, int kStrips, bool kPlanes>
OCTAVO_INLINE inline void add_segment(const GroupProduct& p, int strip, std::int64_t segment,
                                      const Sums (&sums)[kPlanes ? 2 * kRows : kRows][kStrips],
                                      Vector (&outputs)[kRows][kStrips]) {
  const std::int64_t group = segment / p.group_segments;
  const bool has_scale = p.scales.scale_type != Number::none, has_minimum = p.scales.minimum_type != Number::none;
  Vector scale[kStrips];
  OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) scale[s] = load_scale(p.scales, strip + s, group);
  const auto real = [&](int r, int s) OCTAVO_INLINE {
    if constexpr (kPlanes) {
      return rounded(sums[2 * r][s], sums[2 * r + 1][s]);
    } else {
      return rounded(sums[r][s]);
    }
  };
  if (!p.row_scale) {
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
        outputs[r][s] = multiply_add(real(r, s), scale[s], outputs[r][s]);
      }
    }
  } else if (!has_scale) {
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector row_scale = set(p.row_scale[r * p.segment_stride + segment]);
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
        outputs[r][s] = multiply_add(real(r, s), row_scale, outputs[r][s]);
      }
    }
  } else {
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector row_scale = set(p.row_scale[r * p.segment_stride + segment]);
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
        outputs[r][s] = multiply_add(real(r, s) * scale[s], row_scale, outputs[r][s]);
      }
    }
  }
  if (!has_minimum) return;
  OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) scale[s] = load_minimum(p.scales, strip + s, group, scale[s]);
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    const Vector row_sum = set(p.row_sum[r * p.segment_stride + segment]);
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) outputs[r][s] = multiply_add(scale[s], row_sum, outputs[r][s]);
  }
}

template <FloatType kType, int kRows, int kStrips>
void write_outputs(const GroupProduct& p, int strip, const Vector (&outputs)[kRows][kStrips]) {
  OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
    const std::int64_t j = std::int64_t{strip + s} * kStripColumns, lanes = p.n - j;
    const Vector bias = p.bias ? load<FloatType::f32>(p.bias, j, lanes) : set(0.0f);
    const Vector scale = p.column_scale ? load<FloatType::f32>(p.column_scale, j, lanes) : set(1.0f);
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector y = multiply_add(outputs[r][s], set(p.row_factor[r]) * scale, bias);
      store<kType>(p.out, r * p.out_stride + j, y, lanes);
    }
  }
}

// Never inlined, so that g++ assigns registers to one tile at a time.
template <class Form, int kRows, int kStrips, bool kPlanes>
[[gnu::noinline]] void multiply_tile(const GroupProduct& p, int strip) {
  constexpr int kSumRows = kPlanes ? 2 * kRows : kRows;
  const Form form(p.codes);
  Vector outputs[kRows][kStrips];
  OCTAVO_UNROLL for (auto& row : outputs) { OCTAVO_UNROLL for (auto& output : row) output = set(0.0f); }
  const auto* codes = static_cast<const char*>(p.rows);
  const std::uint8_t* at[kStrips];
  OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) at[s] = p.codes.strips + (strip + s) * p.codes.strip_stride;
  std::int64_t unit = 0;
  for (std::int64_t segment = 0; unit < p.units; ++segment) {
    Sums sums[kSumRows][kStrips];
    OCTAVO_UNROLL for (int r = 0; r < kSumRows; ++r) {
      const bool is_high = kPlanes && r % 2 == 0;
      const std::int32_t first = is_high ? 0 : p.row_start[r / (kPlanes ? 2 : 1) * p.segment_stride + segment];
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) start(sums[r][s], first);
    }
    const std::int64_t end = unit + p.segment_units < p.units ? unit + p.segment_units : p.units;
    for (; unit < end; unit += Form::kUnits) {
      form.each_line(at, [&](int line, const Line(&lines)[kStrips]) OCTAVO_INLINE {
        OCTAVO_UNROLL for (int r = 0; r < kSumRows; ++r) {
          const Four activations = load_four(codes + r * p.row_stride + line * kLineK);
          OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) dot(sums[r][s], lines[s], activations);
        }
      });
      codes += Form::kUnits * kUnitK;
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
        if (p.cold && kRows <= 2) __builtin_prefetch(at[s] + kPrefetchBytes, 0, 2);
        at[s] += Form::kStepBytes;
      }
    }
    add_segment<kRows, kStrips, kPlanes>(p, strip, segment, sums, outputs);
  }
  with_type(p.type, [&](auto type) { write_outputs<decltype(type)::value>(p, strip, outputs); });
}

// All strips of a tile, kStrips at a time.
template <class Form, int kRows, int kStrips, bool kPlanes>
void multiply_strips(const GroupProduct& p) {
  int strip = 0;
  for (; strip + kStrips <= p.strip_count; strip += kStrips) multiply_tile<Form, kRows, kStrips, kPlanes>(p, strip);
  for (; strip < p.strip_count; ++strip) multiply_tile<Form, kRows, 1, kPlanes>(p, strip);
}

}  // namespace
}  // namespace octavo
