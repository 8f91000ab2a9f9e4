// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -Wno-maybe-uninitialized -Wno-uninitialized
// vpdpbusd on zmm registers multiplies one line of a strip (16 columns x 4 k) by 4 activation bytes, which are broadcast to
// all columns.
//
// Tiles of 6 rows x 4 strips keep 24 accumulators in registers and need 10 loads for 24 multiplies: the whole layer runs at
// 93 % of the instruction's peak (256 x 4096 x 4096, Zen 4). Tiles of 8 rows x 3 strips need 11 loads but read fewer weights
// at a time. They are 3 % faster with weights from the L3 cache, 9 to 29 % faster with weights from memory and 8 to 16 rows,
// and 1 % slower with weights from the L2 cache.
//
// Strips are sequential streams, which the CPU prefetches by itself. Prefetches in software, 1 KB ahead into the L2 cache, gain
// 10 % for 1 and 2 rows if weights come from beyond the L2 cache, and lose 20 % if weights are in it. For more rows,
// prefetches 256 to 4096 bytes ahead cost 2 to 20 %, except for 3 to 8 rows with weights from the L3 cache (Zen 4). Blocking
// over k or rows, packing activations and prefetching the next panel into the L2 cache gained nothing.
#include <immintrin.h>

#include "epilogue_avx512.h"
#include "isa/common/prefetch.h"
#include "rows.h"

namespace octavo {
namespace {

constexpr TileShape kTile{6, 4}, kTallTile{8, 3};
constexpr int kPrefetchBytes = 1024;

// The instruction is written in asm because g++ 12 moves the accumulators of the intrinsic through the stack when a tile has
// 24 of them, which halves the speed. vpdpbusd wraps around; vpdpbusds, which saturates, would make sums inexact.
inline void dot(__m512i& acc, __m512i activations, __m512i line) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(activations), "v"(line));
}

inline __m512i broadcast(const std::uint8_t* four_codes) {
  std::int32_t word;
  __builtin_memcpy(&word, four_codes, 4);
  return _mm512_set1_epi32(word);
}

// Small tiles have too few accumulators to hide the latency of vpdpbusd. Each accumulator then becomes several partial sums.
constexpr int chains_for(int rows, int strips) { return rows * strips >= 8 ? 1 : rows * strips >= 4 ? 2 : 4; }

// Multiplies one tile, and writes sums to tile.acc or, if e is not null, outputs to e->out. The function is never inlined, so
// that g++ assigns registers to one tile at a time.
template <int kRows, int kStrips, bool kPrefetch>
[[gnu::noinline]] void multiply_tile(const TileProduct& tile, const Epilogue* e) {
  constexpr int kChains = chains_for(kRows, kStrips);
  __m512i acc[kChains][kRows][kStrips];
  OCTAVO_UNROLL for (auto& chain : acc) {
    OCTAVO_UNROLL for (auto& row : chain) { OCTAVO_UNROLL for (auto& sum : row) sum = _mm512_setzero_si512(); }
  }
  const auto* codes = static_cast<const std::uint8_t*>(tile.rows);
  const std::int8_t* strip[kStrips];  // pointers, because g++ would keep sums of strides in vector registers
  OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) strip[s] = tile.strips + s * tile.strip_stride;
  const float* out = e ? static_cast<const float*>(e->out) : nullptr;
  const std::int64_t rows_to_fetch = e ? kRows : 0;
  for (std::int64_t step = 0; step < tile.k_tiles * 4; ++step) {
    OCTAVO_UNROLL for (int line = 0; line < 4; ++line) {
      __m512i weights[kStrips];
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
        const std::int8_t* const at = strip[s] + line * kLineBytes;
        weights[s] = _mm512_loadu_si512(at);
        if (kPrefetch) _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes, _MM_HINT_T1);
      }
      OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512i activations = broadcast(codes + r * tile.row_stride + line * kLineK);
        OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) dot(acc[line % kChains][r][s], activations, weights[s]);
      }
    }
    if (step < rows_to_fetch) {  // outputs, one row at a time: many misses at once would hold up the weights
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) prefetch_to_write(out + s * kStripColumns);
      out += e->out_stride;
    }
    codes += 4 * kLineK;
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) strip[s] += 4 * kLineBytes;
  }
  OCTAVO_UNROLL for (int c = 1; c < kChains; ++c) {
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) acc[0][r][s] = _mm512_add_epi32(acc[0][r][s], acc[c][r][s]);
    }
  }
  if (e) return write_floats(*e, acc[0]);
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
      _mm512_storeu_si512(tile.acc + r * tile.acc_stride + s * kStripColumns, acc[0][r][s]);
    }
  }
}

template <int kRows, bool kPrefetch = false>
void multiply_rows(const TileProduct& tile, const Epilogue* e) {
  switch (tile.strip_count) {
    case 1: return multiply_tile<kRows, 1, kPrefetch>(tile, e);
    case 2: return multiply_tile<kRows, 2, kPrefetch>(tile, e);
    case 3: return multiply_tile<kRows, 3, kPrefetch>(tile, e);
    default:  // tall tiles have 3 strips at most
      if constexpr (kRows <= kTile.rows) multiply_tile<kRows, kTile.strips, kPrefetch>(tile, e);
  }
}

void multiply_into(const TileProduct& tile, const Epilogue* e) {
  switch (tile.m) {
    case 1: return tile.cold ? multiply_rows<1, true>(tile, e) : multiply_rows<1>(tile, e);
    case 2: return tile.cold ? multiply_rows<2, true>(tile, e) : multiply_rows<2>(tile, e);
    case 3: return multiply_rows<3>(tile, e);
    case 4: return multiply_rows<4>(tile, e);
    case 5: return multiply_rows<5>(tile, e);
    case 6: return multiply_rows<6>(tile, e);
    case 7: return multiply_rows<7>(tile, e);
    default: return multiply_rows<8>(tile, e);
  }
}

void multiply(const TileProduct& tile) { multiply_into(tile, nullptr); }

void multiply_to_float(const TileProduct& tile, const Epilogue& e) { multiply_into(tile, &e); }

}  // namespace

extern const Kernel kernel_scalar;

static constexpr Kernel make_table() {
  Kernel table{};
  table.name = "avx512_vnni";
  table.rank = 30;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni;
  table.base = &kernel_scalar;
  table.form = RowForm::u8;
  table.tile = kTile;
  table.tall_tile = kTallTile;
  table.multiply = multiply;
  table.multiply_to_float = multiply_to_float;
  table.epilogue = epilogue;
  table.absmax = absmax;
  table.min_max = min_max;
  table.quantize_row = quantize_row;
  table.split_row = split_row;
  table.dequantize_row = dequantize_row;
  return table;
}

extern constexpr Kernel kernel_avx512_vnni = make_table();

}  // namespace octavo
