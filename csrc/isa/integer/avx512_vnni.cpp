// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -Wno-maybe-uninitialized -Wno-uninitialized
// vpdpbusd on zmm: one line of a strip (16 columns x 4 k) times 4 activation bytes broadcast to all columns.
//
// Tiles of 6 rows x 4 strips keep 24 accumulators in registers, 10 loads for 24 multiplies: the whole layer runs at 93 %
// of the instruction's peak (256 x 4096 x 4096, Zen 4). Tiles of 8 x 3 take 11 loads but fewer weights at a time: 3 %
// faster from the L3 cache, 9 to 29 % from memory at 8 to 16 rows, and 1 % slower from the L2 cache.
//
// Strips are sequential streams, which the CPU prefetches by itself. Only 1 and 2 rows of weights from beyond the L2 cache
// gain from help: 1.1x with prefetches 1 KB ahead into L2 (20 % lost if the weights are in L2). Elsewhere prefetches 256 to
// 4096 bytes ahead cost 2 to 20 %, but for 3 to 8 rows of weights from the L3 cache (Zen 4). Blocking over k or rows, packed
// activations and prefetches of the next panel into the L2 cache gained nothing.
#include <immintrin.h>

#include "epilogue_avx512.h"
#include "isa/common/prefetch.h"

namespace octavo {
namespace {

constexpr TileShape kTile{6, 4}, kTallTile{8, 3};
constexpr int kPrefetchBytes = 1024;

// An instruction of its own, because g++ 12 moves the accumulators of the intrinsic through the stack when a tile has
// 24 of them: half the speed. vpdpbusd wraps; the saturating vpdpbusds would make sums inexact.
inline void dot(__m512i& acc, __m512i activations, __m512i line) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(activations), "v"(line));
}

inline __m512i broadcast(const std::uint8_t* four_codes) {
  std::int32_t word;
  __builtin_memcpy(&word, four_codes, 4);
  return _mm512_set1_epi32(word);
}

// A few rows leave too few accumulators to hide the latency of vpdpbusd: then each has several partial sums.
constexpr int chains_for(int rows, int strips) { return rows * strips >= 8 ? 1 : rows * strips >= 4 ? 2 : 4; }

// Never inlined: one function with all tiles in it would leave g++ too much to choose from.
template <int kRows, int kStrips, bool kPrefetch>
[[gnu::noinline]] void multiply_tile(const TileProduct& tile, const Epilogue* e) {
  constexpr int kChains = chains_for(kRows, kStrips);
  __m512i acc[kChains][kRows][kStrips];
  OCTAVO_UNROLL for (auto& chain : acc) {
    OCTAVO_UNROLL for (auto& row : chain) { OCTAVO_UNROLL for (auto& sum : row) sum = _mm512_setzero_si512(); }
  }
  const auto* codes = static_cast<const std::uint8_t*>(tile.rows);
  const std::int8_t* strip[kStrips];  // not a sum of strides: g++ would keep such sums in vector registers
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
    if (step < rows_to_fetch) {  // lines that will be written; all at once their misses would hold up the weights
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

// Into sums if e is null, else into outputs.
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

constexpr std::int32_t kInfinity = 0x7f800000;

// Magnitudes as integers, where NaN is above Inf and Inf above every finite value: neither gets lost, as in vmaxps.
inline __m512i magnitude(__m512 value) {
  return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
}

template <FloatType kType>
float absmax_of(const void* x, std::int64_t count) {
  __m512i largest[4];
  OCTAVO_UNROLL for (auto& part : largest) part = _mm512_setzero_si512();
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) {
      largest[v] = _mm512_max_epi32(largest[v], magnitude(load_lanes<kType>(x, i + 16 * v, 0xffff)));
    }
  }
  for (; i < count; i += 16) {
    largest[0] = _mm512_max_epi32(largest[0], magnitude(load_lanes<kType>(x, i, first(count - i))));
  }
  largest[0] = _mm512_max_epi32(_mm512_max_epi32(largest[0], largest[1]), _mm512_max_epi32(largest[2], largest[3]));
  const std::int32_t bits = _mm512_reduce_max_epi32(largest[0]);
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

float absmax(const void* x, FloatType type, std::int64_t count) {
  return with_type(type, [&](auto constant) { return absmax_of<constant.value>(x, count); });
}

template <FloatType kType>
RowRange min_max_of(const void* x, std::int64_t count) {
  __m512 least[2], most[2];
  __m512i largest[2];
  OCTAVO_UNROLL for (int v = 0; v < 2; ++v) {
    least[v] = most[v] = _mm512_setzero_ps();
    largest[v] = _mm512_setzero_si512();
  }
  for (std::int64_t i = 0; i < count; i += 32) {
    OCTAVO_UNROLL for (int v = 0; v < 2; ++v) {
      const std::int64_t left = count - i - 16 * v;
      const __m512 value = load_lanes<kType>(x, i + 16 * v, left > 0 ? first(left) : static_cast<__mmask16>(0));
      least[v] = _mm512_min_ps(value, least[v]);
      most[v] = _mm512_max_ps(value, most[v]);
      largest[v] = _mm512_max_epi32(largest[v], magnitude(value));
    }
  }
  if (_mm512_reduce_max_epi32(_mm512_max_epi32(largest[0], largest[1])) >= kInfinity) {
    return {__builtin_nanf(""), __builtin_nanf("")};
  }
  return {_mm512_reduce_min_ps(_mm512_min_ps(least[0], least[1])),
          _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1]))};
}

RowRange min_max(const void* x, FloatType type, std::int64_t count) {
  return with_type(type, [&](auto constant) { return min_max_of<constant.value>(x, count); });
}

// Multiples of 1 / inverse_scale within [low, high], rounded half to even, NaN as 0.
struct Steps {
  __m512 inverse_scale, low, high;

  __m512i of(__m512 x) const {
    const __m512 steps = _mm512_mul_ps(x, inverse_scale);
    const __mmask16 ordered = _mm512_cmp_ps_mask(steps, steps, _CMP_ORD_Q);
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_maskz_max_ps(ordered, steps, low), high));
  }
};

inline Steps steps_within(float inverse_scale, std::int32_t low, std::int32_t high) {
  return {_mm512_set1_ps(inverse_scale), _mm512_set1_ps(static_cast<float>(low)),
          _mm512_set1_ps(static_cast<float>(high))};
}

// 64 int16 in two vectors, as vpackssdw left them (4 lanes interleaved) -> 64 bytes in order.
inline __m512i pack_bytes(__m512i a, __m512i b) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b));
}

template <FloatType kType>
bool quantize_row_of(const QuantizeRow& row) {
  const Steps steps = steps_within(row.inverse_scale, row.qmin - row.zero_point, row.qmax - row.zero_point);
  const __m512i zero_point = _mm512_set1_epi16(static_cast<short>(row.zero_point));
  const __m512i low_byte = _mm512_set1_epi16(0xff);
  __m512i largest = _mm512_setzero_si512();
  const auto steps_of = [&](std::int64_t i, __mmask16 lanes) {
    const __m512 x = load_lanes<kType>(row.x, i, lanes);
    largest = _mm512_max_epi32(largest, magnitude(x));
    return steps.of(x);
  };
  std::int64_t i = 0;
  for (; i + 64 <= row.count; i += 64) {
    __m512i q[4];
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) q[v] = steps_of(i + 16 * v, 0xffff);
    const __m512i a = _mm512_add_epi16(_mm512_packs_epi32(q[0], q[1]), zero_point);
    const __m512i b = _mm512_add_epi16(_mm512_packs_epi32(q[2], q[3]), zero_point);
    _mm512_storeu_si512(row.codes + i, pack_bytes(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte)));
  }
  for (; i < row.count; i += 16) {
    const __mmask16 lanes = first(row.count - i);
    const __m512i code = _mm512_add_epi32(steps_of(i, lanes), _mm512_set1_epi32(row.zero_point));
    _mm512_mask_cvtepi32_storeu_epi8(row.codes + i, lanes, code);
  }
  return _mm512_reduce_max_epi32(largest) < kInfinity;
}

bool quantize_row(const QuantizeRow& row) {
  return with_type(row.type, [&](auto type) { return quantize_row_of<type.value>(row); });
}

template <FloatType kType>
void split_row_of(const SplitRow& row) {
  const Steps steps = steps_within(row.inverse_scale, -kMax16, kMax16);
  const __m512i middle = _mm512_set1_epi16(128), low_byte = _mm512_set1_epi16(0xff);
  const auto high_byte = [&](__m512i q) { return _mm512_add_epi16(_mm512_srai_epi16(q, 8), middle); };
  std::int64_t i = 0;
  for (; i + 64 <= row.count; i += 64) {
    __m512i q[4];
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) q[v] = steps.of(load_lanes<kType>(row.x, i + 16 * v, 0xffff));
    const __m512i a = _mm512_packs_epi32(q[0], q[1]), b = _mm512_packs_epi32(q[2], q[3]);
    _mm512_storeu_si512(row.high + i, pack_bytes(high_byte(a), high_byte(b)));
    _mm512_storeu_si512(row.low + i, pack_bytes(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte)));
  }
  for (; i < row.count; i += 16) {
    const __mmask16 lanes = first(row.count - i);
    const __m512i q = steps.of(load_lanes<kType>(row.x, i, lanes));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(q, 8), _mm512_set1_epi32(128));
    _mm512_mask_cvtepi32_storeu_epi8(row.high + i, lanes, high);
    _mm512_mask_cvtepi32_storeu_epi8(row.low + i, lanes, q);
  }
}

void split_row(const SplitRow& row) {
  with_type(row.type, [&](auto type) { split_row_of<type.value>(row); });
}

template <FloatType kType>
void dequantize_row_of(const DequantizeRow& row) {
  const __m512 scale = _mm512_set1_ps(row.scale);
  const __m512i zero_point = _mm512_set1_epi32(row.zero_point);
  const auto dequantize = [&](std::int64_t i, __mmask16 lanes) {
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes, row.codes + i);
    const __m512i code = row.is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    const __m512 steps = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero_point));
    store_lanes<kType>(row.out, i, lanes, _mm512_mul_ps(steps, scale));
  };
  std::int64_t i = 0;
  for (; i + 64 <= row.count; i += 64) {
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) dequantize(i + 16 * v, 0xffff);
  }
  for (; i < row.count; i += 16) dequantize(i, first(row.count - i));
}

void dequantize_row(const DequantizeRow& row) {
  with_type(row.type, [&](auto type) { dequantize_row_of<type.value>(row); });
}

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
