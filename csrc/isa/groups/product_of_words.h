// SPDX-License-Identifier: Apache-2.0
// The product of groups for codes of 8 bits on AVX2: activations are int16, and signed codes are widened to int16 when they are
// loaded. vpmaddwd is exact for every pair.
//
// As in isa/integer/avx2.cpp, a quarter of a line (4 columns x 4 k) fills a register and is multiplied by 4 activations. Each
// column has two lanes, which are added at the end of a segment. Two quarters and up to 6 rows take 12 registers.
//
// vphaddd leaves 8 columns in the order 0 1 4 5 2 3 6 7. Scales are brought into that order, once for all rows, and outputs out
// of it when they are finished.
#pragma once

#include "product.h"

namespace octavo {
namespace {

constexpr int kQuarterBytes = kLineBytes / 4;

inline void dot_quarter(__m256i& sum, __m256i activations, __m256i codes) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(activations), "x"(codes));
}

// What vphaddd gives, in three instructions of which two can start in a cycle.
inline __m256i added_pairs(__m256i a, __m256i b) {
  const __m256 first = _mm256_castsi256_ps(a), second = _mm256_castsi256_ps(b);
  return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)),
                          _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)));
}

// The sums of a segment for 8 columns of one strip, from `codes` and `lines` on.
template <int kTileRows>
OCTAVO_INLINE inline void multiply_half_strip(const char* codes, std::ptrdiff_t stride, const std::uint8_t* lines,
                                              std::int64_t units, __m256i (&sums)[kTileRows]) {
  __m256i pairs[kTileRows][2];
  each<kTileRows>([&](auto r) OCTAVO_INLINE { pairs[r][0] = pairs[r][1] = _mm256_setzero_si256(); });
  for (std::int64_t unit = 0; unit < units; ++unit) {
    each<4>([&](auto l) OCTAVO_INLINE {
      const std::uint8_t* const at = lines + l * kLineBytes;
      _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes, _MM_HINT_T1);
      const auto widened = [&](int quarter) OCTAVO_INLINE {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + quarter * kQuarterBytes)));
      };
      const __m256i first = widened(0), second = widened(1);
      each<kTileRows>([&](auto r) OCTAVO_INLINE {
        long long word;
        __builtin_memcpy(&word, codes + r * stride + l * 8, 8);
        const __m256i activations = _mm256_set1_epi64x(word);
        dot_quarter(pairs[r][0], activations, first);
        dot_quarter(pairs[r][1], activations, second);
      });
    });
    codes += kUnitK * sizeof(std::int16_t);
    lines += 4 * kLineBytes;
  }
  each<kTileRows>([&](auto r) OCTAVO_INLINE { sums[r] = added_pairs(pairs[r][0], pairs[r][1]); });
}

// From the order of columns to the order of vphaddd, or back.
inline Vector reordered(const Vector& a) {
  const auto half = [](__m256 lanes) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(lanes), 0xd8)); };
  return {half(a.low), half(a.high)};
}

inline void reorder(KeptScales<1>& kept, bool has_minimum) {
  for (int i = 0; i < kKeptSegments; ++i) {
    kept.scale[i][0] = reordered(kept.scale[i][0]);
    if (has_minimum) kept.minimum[i][0] = reordered(kept.minimum[i][0]);
  }
}

template <int kTileRows>
[[gnu::noinline]] void multiply_word_tile(const GroupProduct& p, int strip) {
  Vector outputs[kTileRows][1];
  each<kTileRows>([&](auto r) OCTAVO_INLINE { outputs[r][0] = set(0.0f); });
  const auto* codes = static_cast<const char*>(p.rows);
  const std::uint8_t* lines = p.codes.strips + strip * p.codes.strip_stride;
  KeptScales<1> kept;
  const std::int64_t segments = (p.units + p.segment_units - 1) / p.segment_units;
  for (std::int64_t segment = 0; segment < segments; ++segment) {
    if (p.scales.scale_type != Number::none && segment % kKeptSegments == 0) {
      load_scales(p, strip, 1, segment, segments, kept.scale[0], kept.minimum[0]);
      reorder(kept, p.scales.minimum_type != Number::none);
    }
    const std::int64_t left = p.units - segment * p.segment_units;
    const std::int64_t units = left < p.segment_units ? left : p.segment_units;
    __m256i low[kTileRows], high[kTileRows];
    multiply_half_strip<kTileRows>(codes, p.row_stride, lines, units, low);
    multiply_half_strip<kTileRows>(codes, p.row_stride, lines + 2 * kQuarterBytes, units, high);
    ColumnSums sums[kTileRows][1];
    each<kTileRows>([&](auto r) OCTAVO_INLINE { sums[r][0] = {low[r], high[r]}; });
    if (p.has_start) {
      const std::int32_t* const row_start = p.row_start + segment * p.segment_stride;
      each<kTileRows>([&](auto r) OCTAVO_INLINE {
        const __m256i first = _mm256_set1_epi32(row_start[r]);
        sums[r][0] = {_mm256_add_epi32(low[r], first), _mm256_add_epi32(high[r], first)};
      });
    }
    add_segment<kTileRows, 1, false>(p, segment, kept, sums, outputs);
    codes += units * kUnitK * static_cast<std::int64_t>(sizeof(std::int16_t));
    lines += units * 4 * kLineBytes;
  }
  Vector finished[kTileRows];
  each<kTileRows>([&](auto r) OCTAVO_INLINE { finished[r] = reordered(outputs[r][0]); });
  write_outputs(p, strip, kTileRows, 1, finished);
}

template <int kTileRows>
void multiply_word_strips(const GroupProduct& p) {
  for (int strip = 0; strip < p.strip_count; ++strip) multiply_word_tile<kTileRows>(p, strip);
}

void multiply_words(const GroupProduct& p) {
  switch (p.m) {
    case 1: return multiply_word_strips<1>(p);
    case 2: return multiply_word_strips<2>(p);
    case 3: return multiply_word_strips<3>(p);
    case 4: return multiply_word_strips<4>(p);
    case 5: return multiply_word_strips<5>(p);
    default: return multiply_word_strips<6>(p);
  }
}

}  // namespace
}  // namespace octavo
