// SPDX-License-Identifier: Apache-2.0
// The product of groups for segments of 16 k, which are halves of packed blocks: sums are finished in the middle of a step, too.
// One strip and few rows at a time; calls with more rows unpack strips first.
#pragma once

#include "product.h"

namespace octavo {
namespace {

template <class Form, int kRows, bool kPlanes>
[[gnu::noinline]] void multiply_tile_of_halves(const GroupProduct& p, int strip) {
  constexpr int kSumRows = kPlanes ? 2 * kRows : kRows;
  const Form form(p.codes);
  Vector outputs[kRows][1];
  each<kRows>([&](auto r) OCTAVO_INLINE { outputs[r][0] = set(0.0f); });
  const auto* codes = static_cast<const char*>(p.rows);
  const std::uint8_t* at[1] = {p.codes.strips + strip * p.codes.strip_stride};
  KeptScales<1> kept;
  for (std::int64_t segment = 0; segment < p.units; segment += 2) {
    if (p.scales.scale_type != Number::none && segment % kKeptSegments == 0) {
      load_scales(p, strip, 1, segment, p.units, kept.scale[0], kept.minimum[0]);
    }
    ColumnSums sums[kSumRows][1];
    start_sums<kSumRows, 1, kPlanes>(p, segment, sums);
    form.each_line(at, [&](int line, const Line(&lines)[1]) OCTAVO_INLINE {
      if (line == kBlockLines / 2) {
        add_segment<kRows, 1, kPlanes>(p, segment, kept, sums, outputs);
        start_sums<kSumRows, 1, kPlanes>(p, segment + 1, sums);
      }
      each<kSumRows>([&](auto r) OCTAVO_INLINE {
        dot(sums[r][0], lines[0], load_four(codes + r * p.row_stride + line * kLineK));
      });
    });
    add_segment<kRows, 1, kPlanes>(p, segment + 1, kept, sums, outputs);
    codes += kBlockK;
    if (p.cold) {
      each<Form::kStepBytes / kLineBytes>(
          [&](auto l) OCTAVO_INLINE { __builtin_prefetch(at[0] + kPrefetchBytes + l * kLineBytes, 0, 2); });
    }
    at[0] += Form::kStepBytes;
  }
  write_tile(p, strip, outputs);
}

template <class Form, int kRows>
void multiply_strips_of_halves(const GroupProduct& p) {
  for (int strip = 0; strip < p.strip_count; ++strip) {
    p.planes ? multiply_tile_of_halves<Form, kRows, true>(p, strip)
             : multiply_tile_of_halves<Form, kRows, false>(p, strip);
  }
}

template <class Form>
void multiply_halves_of(const GroupProduct& p) {
  switch (p.m) {
    case 1: return multiply_strips_of_halves<Form, 1>(p);
    case 2: return multiply_strips_of_halves<Form, 2>(p);
    default: return multiply_strips_of_halves<Form, 3>(p);
  }
}

void multiply_halves(const GroupProduct& p) {
  if (p.codes.table) return multiply_halves_of<Table>(p);
  switch (p.codes.bits) {
    case 2: return multiply_halves_of<Quarters>(p);
    case 3: return multiply_halves_of<Thirds>(p);
    case 4: return multiply_halves_of<Halves>(p);
    default: return multiply_halves_of<Planes<6>>(p);
  }
}

}  // namespace
}  // namespace octavo
