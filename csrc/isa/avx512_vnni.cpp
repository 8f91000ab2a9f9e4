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

#include "../float_type.h"
#include "../kernel.h"
#include "../lanes_avx512.h"

namespace octavo {
namespace {

#define OCTAVO_UNROLL _Pragma("GCC unroll 32")

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

template <int kRows, int kStrips, bool kPrefetch>
void multiply_tile(const TileProduct& tile) {
  constexpr int kChains = chains_for(kRows, kStrips);
  __m512i acc[kChains][kRows][kStrips];
  OCTAVO_UNROLL for (auto& chain : acc) {
    OCTAVO_UNROLL for (auto& row : chain) { OCTAVO_UNROLL for (auto& sum : row) sum = _mm512_setzero_si512(); }
  }
  const auto* codes = static_cast<const std::uint8_t*>(tile.rows);
  const std::int8_t* strip[kStrips];  // not a sum of strides: g++ would keep such sums in vector registers
  OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) strip[s] = tile.strips + s * tile.strip_stride;
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
    codes += 4 * kLineK;
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) strip[s] += 4 * kLineBytes;
  }
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int s = 0; s < kStrips; ++s) {
      __m512i sum = acc[0][r][s];
      OCTAVO_UNROLL for (int c = 1; c < kChains; ++c) sum = _mm512_add_epi32(sum, acc[c][r][s]);
      _mm512_storeu_si512(tile.acc + r * tile.acc_stride + s * kStripColumns, sum);
    }
  }
}

using Multiply = void (*)(const TileProduct&);

template <int kRows, bool kPrefetch = false>
constexpr Multiply multiply_for(int strips) {
  constexpr int kMost = kRows <= kTile.rows ? kTile.strips : kTallTile.strips;
  constexpr Multiply by_strips[] = {multiply_tile<kRows, 1, kPrefetch>, multiply_tile<kRows, 2, kPrefetch>,
                                    multiply_tile<kRows, 3, kPrefetch>, multiply_tile<kRows, kMost, kPrefetch>};
  return by_strips[strips - 1];
}

void multiply(const TileProduct& tile) {
  switch (tile.m) {
    case 1: return (tile.cold ? multiply_for<1, true> : multiply_for<1>)(tile.strip_count)(tile);
    case 2: return (tile.cold ? multiply_for<2, true> : multiply_for<2>)(tile.strip_count)(tile);
    case 3: return multiply_for<3>(tile.strip_count)(tile);
    case 4: return multiply_for<4>(tile.strip_count)(tile);
    case 5: return multiply_for<5>(tile.strip_count)(tile);
    case 6: return multiply_for<6>(tile.strip_count)(tile);
    case 7: return multiply_for<7>(tile.strip_count)(tile);
    default: return multiply_for<8>(tile.strip_count)(tile);
  }
}

// What the epilogue needs of up to 64 columns, in registers while the rows go by. Their correction changes only where
// two rows differ in zero point, which symmetric rows never do.
template <int kVectors>
struct Columns {
  __m512i sum[kVectors], correction[kVectors];
  __m512 scale[kVectors], bias[kVectors];
  __mmask16 last;  // lanes of the last vector; all others are full

  __mmask16 lanes(int v) const { return v == kVectors - 1 ? last : static_cast<__mmask16>(0xffff); }

  void correct_for(std::int32_t zero_point) {
    OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) {
      correction[v] = _mm512_mullo_epi32(_mm512_set1_epi32(zero_point), sum[v]);
    }
  }
};

template <int kVectors>
Columns<kVectors> load_columns(const Epilogue& e, int j) {
  Columns<kVectors> columns;
  columns.last = first(e.n - j - 16 * (kVectors - 1));
  OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) {
    const __mmask16 lanes = columns.lanes(v);
    columns.sum[v] = _mm512_maskz_loadu_epi32(lanes, e.column_sum + j + 16 * v);
    columns.scale[v] = _mm512_maskz_loadu_ps(lanes, e.column_scale + j + 16 * v);
    columns.bias[v] = e.bias ? _mm512_maskz_loadu_ps(lanes, e.bias + j + 16 * v) : _mm512_setzero_ps();
  }
  return columns;
}

// 256 * high + low, rounded once: exact in double.
inline __m512 joined(__m512i high, __m512i low) {
  const auto half = [](__m256i h, __m256i l) {
    return _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_set1_pd(256.0), _mm512_cvtepi32_pd(h), _mm512_cvtepi32_pd(l)));
  };
  const __m256 first = half(_mm512_castsi512_si256(high), _mm512_castsi512_si256(low));
  const __m256 second = half(_mm512_extracti64x4_epi64(high, 1), _mm512_extracti64x4_epi64(low, 1));
  return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
}

// The exact sums of 16 outputs of row i from column j on, rounded once.
template <Sums kSums>
inline __m512 rounded_sums(const Epilogue& e, int i, int j, __m512i correction) {
  if constexpr (kSums == Sums::wide) {
    const double* const wide = e.wide + i * e.acc_stride + j;
    const __m256 first = _mm512_cvtpd_ps(_mm512_loadu_pd(wide)), second = _mm512_cvtpd_ps(_mm512_loadu_pd(wide + 8));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
  const std::int32_t* const acc = e.acc + (kSums == Sums::planes ? 2 * i : i) * e.acc_stride + j;
  const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(acc), correction);
  return kSums == Sums::planes ? joined(sum, _mm512_loadu_si512(acc + e.acc_stride)) : _mm512_cvtepi32_ps(sum);
}

template <FloatType kType, Sums kSums, int kVectors>
void epilogue_columns(const Epilogue& e, int j) {
  Columns<kVectors> columns = load_columns<kVectors>(e, j);
  std::int32_t zero_point = kSums == Sums::planes ? 128 : e.rows[0].zero_point;
  columns.correct_for(zero_point);
  for (int i = 0; i < e.m; ++i) {
    if (kSums == Sums::plain && e.rows[i].zero_point != zero_point) {
      zero_point = e.rows[i].zero_point;
      columns.correct_for(zero_point);
    }
    const __m512 row_scale = _mm512_set1_ps(e.rows[i].scale);
    OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) {
      const __m512 t = rounded_sums<kSums>(e, i, j + 16 * v, columns.correction[v]);
      const __m512 scale = _mm512_mul_ps(row_scale, columns.scale[v]);
      const __m512 y = _mm512_fmadd_ps(t, scale, columns.bias[v]);
      store_lanes<kType>(e.out, i * e.out_stride + j + 16 * v, columns.lanes(v), y);
    }
  }
}

template <FloatType kType, Sums kSums>
void epilogue_rows(const Epilogue& e) {
  for (int j = 0; j < e.n; j += 64) {
    switch ((e.n - j + 15) / 16) {
      case 1: epilogue_columns<kType, kSums, 1>(e, j); break;
      case 2: epilogue_columns<kType, kSums, 2>(e, j); break;
      case 3: epilogue_columns<kType, kSums, 3>(e, j); break;
      default: epilogue_columns<kType, kSums, 4>(e, j);
    }
  }
}

template <FloatType kType>
void epilogue_of(const Epilogue& e) {
  switch (e.sums) {
    case Sums::plain: return epilogue_rows<kType, Sums::plain>(e);
    case Sums::planes: return epilogue_rows<kType, Sums::planes>(e);
    case Sums::wide: return epilogue_rows<kType, Sums::wide>(e);
  }
}

void epilogue(const Epilogue& e) {
  with_type(e.type, [&](auto type) { epilogue_of<type.value>(e); });
}

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
extern const Kernel kernel_avx512_vnni;
const Kernel kernel_avx512_vnni = {
    "avx512_vnni",  // name
    30,             // rank
    kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni,
    &kernel_scalar,  // base
    RowForm::u8,     // form
    kTile,
    kTallTile,
    1,  // min_rows
    multiply,
    nullptr,  // leave
    epilogue,
    nullptr,  // widen_row
    absmax,
    min_max,
    quantize_row,
    split_row,
    dequantize_row,
};

}  // namespace octavo
