// SPDX-License-Identifier: Apache-2.0
// The product of groups over the Line, Four and ColumnSums of an instruction set that adds products of bytes in int32.
//
// A tile keeps its int32 sums of a segment and its float32 outputs in registers. At the end of a segment the sums become
// floats and are added to the outputs: one conversion, one or two multiplications and one addition for each output.
#pragma once

#include "codes.h"
#include "scales.h"

namespace octavo {
namespace {

// Adds the sums of one segment to the outputs of a tile.
template <int kRows, int kStrips, bool kPlanes>
OCTAVO_INLINE inline void add_segment(const GroupProduct& p, std::int64_t segment, const KeptScales<kStrips>& kept,
                                      const ColumnSums (&sums)[kPlanes ? 2 * kRows : kRows][kStrips],
                                      Vector (&outputs)[kRows][kStrips]) {
  const bool has_scale = p.scales.scale_type != Number::none, has_minimum = p.scales.minimum_type != Number::none;
  const Vector(&scale)[kStrips] = kept.scale[segment % kKeptSegments];
  const Vector(&minimum)[kStrips] = kept.minimum[segment % kKeptSegments];
  const float* const row_scales = p.row_scale + segment * p.segment_stride;
  const auto each_output = [&](const auto& f) OCTAVO_INLINE {
    each<kRows>([&](auto r) OCTAVO_INLINE {
      const float* const row_scale = row_scales + r;
      each<kStrips>([&](auto s) OCTAVO_INLINE {
        if constexpr (kPlanes) {
          outputs[r][s] = f(rounded(sums[2 * r][s], sums[2 * r + 1][s]), s, row_scale, outputs[r][s]);
        } else {
          outputs[r][s] = f(rounded(sums[r][s]), s, row_scale, outputs[r][s]);
        }
      });
    });
  };
  using Factor = const float*;
  if (!p.row_scale && !has_scale) {
    each_output([](const Vector& t, auto, Factor, const Vector& y) OCTAVO_INLINE { return t + y; });
  } else if (!p.row_scale) {
    each_output([&](const Vector& t, auto s, Factor, const Vector& y)
                    OCTAVO_INLINE { return multiply_add(t, scale[s], y); });
  } else if (!has_scale) {
    each_output([](const Vector& t, auto, Factor row_scale, const Vector& y)
                    OCTAVO_INLINE { return multiply_add(t, set(*row_scale), y); });
  } else {
    each_output([&](const Vector& t, auto s, Factor row_scale, const Vector& y)
                    OCTAVO_INLINE { return multiply_add(t * scale[s], set(*row_scale), y); });
  }
  if (!has_minimum) return;
  const float* const row_sums = p.row_sum + segment * p.segment_stride;
  each<kRows>([&](auto r) OCTAVO_INLINE {
    const Vector row_sum = set(row_sums[r]);
    each<kStrips>([&](auto s) OCTAVO_INLINE { outputs[r][s] = multiply_add(minimum[s], row_sum, outputs[r][s]); });
  });
}

template <FloatType kType>
void write_outputs_of(const GroupProduct& p, int strip, int rows, int strips, const Vector* outputs) {
  for (int s = 0; s < strips; ++s) {
    const std::int64_t j = std::int64_t{strip + s} * kStripColumns, lanes = p.n - j;
    const Vector bias = p.bias ? load<FloatType::f32>(p.bias, j, lanes) : set(0.0f);
    const Vector scale = p.column_scale ? load<FloatType::f32>(p.column_scale, j, lanes) : set(1.0f);
    for (int r = 0; r < rows; ++r) {
      const Vector y = multiply_add(outputs[r * strips + s], set(p.row_factor[r]) * scale, bias);
      store<kType>(p.out, r * p.out_stride + j, y, lanes);
    }
  }
}

// `outputs` is [rows][strips].
[[gnu::noinline]] void write_outputs(const GroupProduct& p, int strip, int rows, int strips, const Vector* outputs) {
  with_type(p.type, [&](auto type) { write_outputs_of<decltype(type)::value>(p, strip, rows, strips, outputs); });
}

// Whether the products of one step can be added in words, which holds twice as many as int32.
template <class Form>
constexpr bool kStepFitsWords = kAddsInWords && Form::kLargestCode * 127 * 2 * Form::kUnits * 4 <= 32767;

// Calls dot(is_first, sum, line of codes, activations) for the products of one step.
template <class Form, int kRows, int kStrips, class Sum, class Dot>
OCTAVO_INLINE inline void each_product(const Form& form, const std::uint8_t* const (&at)[kStrips], const char* codes,
                                       std::ptrdiff_t stride, Sum (&sums)[kRows][kStrips], const Dot& dot) {
  form.each_line(at, [&](int line, const Line(&lines)[kStrips]) OCTAVO_INLINE {
    each<kRows>([&](auto r) OCTAVO_INLINE {
      const Four& activations = load_four(codes + r * stride + line * kLineK);
      each<kStrips>([&](auto s) OCTAVO_INLINE { dot(line == 0, sums[r][s], lines[s], activations); });
    });
  });
}

// What a tile reads next: the codes of its weights and of its rows.
template <int kStrips>
struct TilePlace {
  const std::uint8_t* at[kStrips];
  const char* codes;

  template <class Form>
  OCTAVO_INLINE void advance(bool prefetches) {
    codes += Form::kUnits * kUnitK;
    each<kStrips>([&](auto s) OCTAVO_INLINE {
      if (prefetches) {
        each<Form::kStepBytes / kLineBytes>(
            [&](auto l) OCTAVO_INLINE { __builtin_prefetch(at[s] + kPrefetchBytes + l * kLineBytes, 0, 2); });
      }
      at[s] += Form::kStepBytes;
    });
  }
};

// The sums of one segment, from `sums` on.
template <class Form, int kRows, int kStrips>
OCTAVO_INLINE inline void add_steps(const Form& form, TilePlace<kStrips>& place, std::ptrdiff_t stride,
                                    std::int64_t units, bool prefetches, ColumnSums (&sums)[kRows][kStrips]) {
  for (std::int64_t unit = 0; unit < units; unit += Form::kUnits) {
    each_product(form, place.at, place.codes, stride, sums,
                 [](bool, ColumnSums& sum, const Line& codes, const Four& activations)
                     OCTAVO_INLINE { dot(sum, codes, activations); });
    place.template advance<Form>(prefetches);
  }
}

// The same where the products of one step are added in words first. Most segments are one step long: their sums never leave
// registers, which hold the words of a tile or its sums, but not both.
template <class Form, int kRows, int kStrips>
OCTAVO_INLINE inline void add_steps_in_words(const Form& form, TilePlace<kStrips>& place, std::ptrdiff_t stride,
                                             std::int64_t units, bool prefetches, ColumnSums (&sums)[kRows][kStrips]) {
  ColumnSums before[kRows][kStrips];
  const auto each_sum = [&](const auto& f) OCTAVO_INLINE {
    each<kRows>([&](auto r) OCTAVO_INLINE { each<kStrips>([&](auto s) OCTAVO_INLINE { f(r, s); }); });
  };
  WordSums words[kRows][kStrips];
  for (std::int64_t unit = 0;; unit += Form::kUnits) {
    each_product(form, place.at, place.codes, stride, words,
                 [](bool is_first, auto& sum, const Line& codes, const Four& activations)
                     OCTAVO_INLINE { is_first ? dot_first(sum, codes, activations) : dot(sum, codes, activations); });
    place.template advance<Form>(prefetches);
    if (unit + Form::kUnits >= units) break;
    if (unit == 0) {
      each_sum([&](auto r, auto s) OCTAVO_INLINE { before[r][s] = widened(words[r][s]); });
    } else {
      each_sum([&](auto r, auto s) OCTAVO_INLINE { add(before[r][s], widened(words[r][s])); });
    }
  }
  each_sum([&](auto r, auto s) OCTAVO_INLINE { add(sums[r][s], widened(words[r][s])); });
  if (units > Form::kUnits) each_sum([&](auto r, auto s) OCTAVO_INLINE { add(sums[r][s], before[r][s]); });
}

// Never inlined, so that g++ assigns registers to one tile at a time.
template <class Form, int kRows, int kStrips, bool kPlanes>
[[gnu::noinline]] void multiply_tile(const GroupProduct& p, int strip) {
  constexpr int kSumRows = kPlanes ? 2 * kRows : kRows;
  const Form form(p.codes);
  Vector outputs[kRows][kStrips];
  each<kRows>([&](auto r) OCTAVO_INLINE { each<kStrips>([&](auto s) OCTAVO_INLINE { outputs[r][s] = set(0.0f); }); });
  TilePlace<kStrips> place;
  place.codes = static_cast<const char*>(p.rows);
  each<kStrips>([&](auto s) OCTAVO_INLINE { place.at[s] = p.codes.strips + (strip + s) * p.codes.strip_stride; });
  KeptScales<kStrips> kept;
  const std::int64_t segments = (p.units + p.segment_units - 1) / p.segment_units;
  const bool prefetches = kRows <= kPrefetchRows && p.cold;
  for (std::int64_t segment = 0; segment < segments; ++segment) {
    if (p.scales.scale_type != Number::none && segment % kKeptSegments == 0) {
      load_scales(p, strip, kStrips, segment, segments, kept.scale[0], kept.minimum[0]);
    }
    ColumnSums sums[kSumRows][kStrips];
    const std::int32_t* const row_start = p.row_start + segment * p.segment_stride;
    each<kSumRows>([&](auto r) OCTAVO_INLINE {
      const bool is_high = kPlanes && r % 2 == 0;
      const std::int32_t first = is_high ? 0 : row_start[r / (kPlanes ? 2 : 1)];
      each<kStrips>([&](auto s) OCTAVO_INLINE { start(sums[r][s], first); });
    });
    const std::int64_t left = p.units - segment * p.segment_units;
    const std::int64_t units = left < p.segment_units ? left : p.segment_units;
    if constexpr (kStepFitsWords<Form>) {
      add_steps_in_words(form, place, p.row_stride, units, prefetches, sums);
    } else {
      add_steps(form, place, p.row_stride, units, prefetches, sums);
    }
    add_segment<kRows, kStrips, kPlanes>(p, segment, kept, sums, outputs);
  }
  Vector finished[kRows * kStrips];
  each<kRows>([&](auto r) OCTAVO_INLINE {
    each<kStrips>([&](auto s) OCTAVO_INLINE { finished[r * kStrips + s] = outputs[r][s]; });
  });
  write_outputs(p, strip, kRows, kStrips, finished);
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
