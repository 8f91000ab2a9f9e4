// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mamx-tile -mamx-int8 -Wno-maybe-uninitialized -Wno-uninitialized
// tdpbssd multiplies 16 rows by the 16 columns of a strip, over the k of one segment. Its sums go through memory to zmm
// registers, where they become floats and are added to 16 x 16 outputs, which stay in registers.
//
// A segment of 32 k uses half of the instruction, and each sum is stored and loaded again. Still a tile takes a third of the
// time of vpdpbusd. Several segments are multiplied before their sums are read, so that neither waits for the other.
#include "lines_avx512.h"

namespace octavo {
namespace {
constexpr int kPrefetchBytes = 2048, kPrefetchRows = 0;
}
}  // namespace octavo

#include <algorithm>

#include "product.h"

namespace octavo {
namespace {

constexpr int kHeight = 16;
constexpr int kAhead = 4;        // segments whose sums are in memory at a time
constexpr int kPieceUnits = 32;  // how much of k is multiplied before the next strip
constexpr int kMaxStrips = 4, kMaxBlocks = 2;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

thread_local int configured_height = 0, configured_k = 0;

// Tiles 0 .. 3 hold sums, 4 and 5 activations of k bytes a row, 6 and 7 weights of k / 4 lines.
void configure(int height, int k) {
  if (height == configured_height && k == configured_k) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = static_cast<std::uint16_t>(tile == 4 || tile == 5 ? k : kLineBytes);
    config.rows[tile] = static_cast<std::uint8_t>(tile >= 6 ? k / kLineK : height);
  }
  asm volatile("" ::: "memory");  // _tile_loadconfig does not tell the compiler that it reads all of config
  _tile_loadconfig(&config);
  configured_height = height;
  configured_k = k;
}

// Tile registers must not stay in use after a call: the OS would save their 8 KB at each context switch.
void leave() {
  _tile_release();
  configured_height = configured_k = 0;
}

using TileSums = std::int32_t[kHeight][kStripColumns];

// The sums of one segment, whose k is `steps` times what the tiles are configured for. A macro, because the intrinsics paste the
// numbers of tile registers into names.
#define OCTAVO_MULTIPLY_SEGMENT(sums_tile, rows_tile, lines_tile)               \
  _tile_zero(sums_tile);                                                        \
  for (int step = 0; step < steps; ++step) {                                    \
    _tile_loadd(rows_tile, codes + step * step_k, stride);                      \
    _tile_loadd(lines_tile, lines + step * step_k * kStripColumns, kLineBytes); \
    _tile_dpbssd(sums_tile, rows_tile, lines_tile);                             \
  }                                                                             \
  _tile_stored(sums_tile, sums, kLineBytes)

template <int kTile>
OCTAVO_INLINE inline void multiply_segment(const char* codes, std::ptrdiff_t stride, const std::uint8_t* lines,
                                           int steps, int step_k, TileSums& sums) {
  if constexpr (kTile == 0) {
    OCTAVO_MULTIPLY_SEGMENT(0, 4, 6);
  } else if constexpr (kTile == 1) {
    OCTAVO_MULTIPLY_SEGMENT(1, 5, 7);
  } else if constexpr (kTile == 2) {
    OCTAVO_MULTIPLY_SEGMENT(2, 4, 6);
  } else {
    OCTAVO_MULTIPLY_SEGMENT(3, 5, 7);
  }
}

template <bool kHasScale, bool kHasRowScale, bool kHasStart>
OCTAVO_INLINE inline void add_sums(const GroupProduct& p, const std::ptrdiff_t (&row)[kHeight], std::int64_t segment,
                                   const TileSums& sums, const Vector& scale, Vector (&outputs)[kHeight]) {
  each<kHeight>([&](auto r) OCTAVO_INLINE {
    __m512i sum = _mm512_load_si512(sums[r]);
    if constexpr (kHasStart)
      sum = _mm512_add_epi32(sum, _mm512_set1_epi32(p.row_start[segment * p.segment_stride + row[r]]));
    Vector t{_mm512_cvtepi32_ps(sum)};
    if constexpr (!kHasRowScale) {
      outputs[r] = kHasScale ? multiply_add(t, scale, outputs[r]) : outputs[r] + t;
    } else {
      if constexpr (kHasScale) t = t * scale;
      outputs[r] = multiply_add(t, set(p.row_scale[segment * p.segment_stride + row[r]]), outputs[r]);
    }
  });
}

// The most units, up to 4, of which a segment is a whole number.
int step_of(int segment_units) {
  int units = 4;
  while (segment_units % units != 0) --units;
  return units;
}

// 16 rows, of which `height` are rows of the product, times one strip, over the segments `begin` .. `end`. Rows beyond the last
// one are computed from it, and not written.
struct Block {
  int first, height, strip;
  std::int64_t begin, end;
  Vector* outputs;  // [kHeight], between one call and the next
};

template <bool kHasScale, bool kHasRowScale, bool kHasStart>
[[gnu::noinline]] void multiply_block(const GroupProduct& all, const Block& block) {
  const GroupProduct p = all;
  const int step_units = step_of(p.segment_units), step_k = step_units * kUnitK, steps = p.segment_units / step_units;
  const std::int64_t segment_k = std::int64_t{p.segment_units} * kUnitK;
  const char* const codes = static_cast<const char*>(p.rows) + block.first * p.row_stride;
  const std::uint8_t* const lines = p.codes.strips + block.strip * p.codes.strip_stride;
  const std::int64_t end = block.end;
  const bool has_minimum = p.scales.minimum_type != Number::none;
  configure(block.height, step_k);

  std::ptrdiff_t row[kHeight];
  for (int r = 0; r < kHeight; ++r) {
    row[r] = block.first + (r < block.height ? r : block.height - 1);
  }
  alignas(64) TileSums sums[kAhead];
  KeptScales<1> kept;
  if (kHasScale) load_scales(p, block.strip, 1, block.begin, end, kept.scale[0], kept.minimum[0]);
  Vector outputs[kHeight];
  each<kHeight>([&](auto r) OCTAVO_INLINE { outputs[r] = block.outputs[r]; });
  const auto multiply_one = [&](auto tile, std::int64_t segment) OCTAVO_INLINE {
    if (segment >= end) return;
    const std::int64_t k = segment * segment_k, left = p.units * kUnitK - k;
    // The last segment may be shorter; what lies beyond it is 0 in the rows of codes.
    const int own_steps = left < segment_k ? static_cast<int>((left + step_k - 1) / step_k) : steps;
    multiply_segment<decltype(tile)::value>(codes + k, p.row_stride, lines + k * kStripColumns, own_steps, step_k,
                                            sums[decltype(tile)::value]);
  };
  each<kAhead>([&](auto tile) OCTAVO_INLINE { multiply_one(tile, block.begin + decltype(tile)::value); });
  for (std::int64_t at = block.begin; at < end; at += kAhead) {
    each<kAhead>([&](auto tile) OCTAVO_INLINE {
      const std::int64_t segment = at + decltype(tile)::value;
      if (segment >= end) return;
      const auto slot = static_cast<int>(segment - block.begin);
      add_sums<kHasScale, kHasRowScale, kHasStart>(p, row, segment, sums[decltype(tile)::value], kept.scale[slot][0],
                                                   outputs);
      if (has_minimum) {
        each<kHeight>([&](auto r) OCTAVO_INLINE {
          outputs[r] =
              multiply_add(kept.minimum[slot][0], set(p.row_sum[segment * p.segment_stride + row[r]]), outputs[r]);
        });
      }
      multiply_one(tile, segment + kAhead);
    });
  }
  each<kHeight>([&](auto r) OCTAVO_INLINE { block.outputs[r] = outputs[r]; });
}

// Rows in blocks of one height, of which the last one begins early enough to end with the last row. k is taken a piece at a
// time, so that the codes of all rows and the lines of a strip stay in the L1 cache while blocks and strips go by.
template <bool kHasScale, bool kHasRowScale, bool kHasStart>
void multiply_tile(const GroupProduct& p) {
  const int blocks = (p.m + kHeight - 1) / kHeight, height = (p.m + blocks - 1) / blocks;
  const auto first_row = [&](int block) { return block + 1 < blocks ? block * height : p.m - height; };
  const std::int64_t segments = (p.units + p.segment_units - 1) / p.segment_units;
  const std::int64_t fitting = kPieceUnits / p.segment_units;
  const std::int64_t piece = fitting < 1 ? 1 : fitting < kKeptSegments ? fitting : kKeptSegments;
  Vector outputs[kMaxStrips][kMaxBlocks][kHeight];
  for (auto& strip : outputs) {
    for (auto& block : strip) std::fill_n(block, kHeight, set(0.0f));
  }
  for (std::int64_t begin = 0; begin < segments; begin += piece) {
    const std::int64_t end = begin + piece < segments ? begin + piece : segments;
    for (int strip = 0; strip < p.strip_count; ++strip) {
      for (int block = 0; block < blocks; ++block) {
        multiply_block<kHasScale, kHasRowScale, kHasStart>(
            p, {first_row(block), height, strip, begin, end, outputs[strip][block]});
      }
    }
  }
  for (int block = 0; block < blocks; ++block) {
    GroupProduct rows = p;
    rows.out = static_cast<char*>(p.out) + first_row(block) * p.out_stride * bytes_of(p.type);
    rows.row_factor += first_row(block);
    for (int strip = 0; strip < p.strip_count; ++strip) write_outputs(rows, strip, height, 1, outputs[strip][block]);
  }
}

template <bool kHasScale, bool kHasRowScale>
void multiply_scaled(const GroupProduct& p) {
  p.has_start ? multiply_tile<kHasScale, kHasRowScale, true>(p) : multiply_tile<kHasScale, kHasRowScale, false>(p);
}

void multiply(const GroupProduct& p) {
  const bool has_scale = p.scales.scale_type != Number::none;
  if (p.row_scale) return has_scale ? multiply_scaled<true, true>(p) : multiply_scaled<false, true>(p);
  has_scale ? multiply_scaled<true, false>(p) : multiply_scaled<false, false>(p);
}

}  // namespace

extern const GroupKernel group_kernel_avx512_vnni;

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "amx_int8";
  table.rank = 40;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni |
                   kFeatureAmxTile | kFeatureAmxInt8;
  table.base = &group_kernel_avx512_vnni;
  table.min_rows = 8;
  table.signed_lines = true;
  table.largest_byte_code = 255;
  table.rows = kMaxBlocks * kHeight;
  table.multiply = multiply;
  table.leave = leave;
  return table;
}

extern constexpr GroupKernel group_kernel_amx_int8 = make_table();

}  // namespace octavo
