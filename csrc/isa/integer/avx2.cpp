// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c
// vpmaddwd on int16: exact for every pair of codes. vpmaddubsw would be half the instructions on bytes, but it
// saturates (255 * 127 * 2 > 32,767), so activation rows come widened to int16 and weights are widened on load.
//
// A quarter of a line (4 columns x 4 k) fills a ymm of int16; it meets 4 activations, broadcast as one 64-bit word.
// Each column thus owns two int32 lanes, added at the very end. The whole layer runs at 86 % of what vpmaddwd and vpaddd
// allow (256 x 4096 x 4096, Zen 4).
#include <immintrin.h>

#include "contract/kernel.h"
#include "isa/common/float_type.h"
#include "isa/common/lanes_avx2.h"

namespace octavo {
namespace {

// Into the L2 cache: 1.4x at 4 rows of weights from memory, 1.04x at 64, against 2 KB ahead into L1 (Zen 4).
constexpr int kPrefetchBytes = 6144;
constexpr int kQuarterBytes = kLineBytes / 4;

// One asm for the pair, because g++ 12 otherwise moves accumulators through the stack.
inline void dot(__m256i& acc, __m256i activations, __m256i weights) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(activations), "x"(weights));
}

inline __m256i broadcast(const std::int16_t* four_codes) {
  long long word;
  __builtin_memcpy(&word, four_codes, 8);
  return _mm256_set1_epi64x(word);
}

inline __m256i widened(const std::int8_t* quarter) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(quarter)));
}

// Columns 4 * first_quarter .. of one strip: 4 * kQuarters of them.
template <int kRows, int kQuarters>
void multiply_quarters(const TileProduct& tile, int strip, int first_quarter) {
  __m256i acc[kRows][kQuarters];
  OCTAVO_UNROLL for (auto& row : acc) { OCTAVO_UNROLL for (auto& sum : row) sum = _mm256_setzero_si256(); }
  const auto* codes = static_cast<const char*>(tile.rows);
  const std::int8_t* line = tile.strips + strip * tile.strip_stride + first_quarter * kQuarterBytes;
  for (std::int64_t step = 0; step < tile.k_tiles * 4; ++step) {
    OCTAVO_UNROLL for (int l = 0; l < 4; ++l) {
      _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T1);
      __m256i weights[kQuarters];
      OCTAVO_UNROLL for (int q = 0; q < kQuarters; ++q) weights[q] = widened(line + q * kQuarterBytes);
      OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
        const __m256i activations = broadcast(reinterpret_cast<const std::int16_t*>(codes + r * tile.row_stride));
        OCTAVO_UNROLL for (int q = 0; q < kQuarters; ++q) dot(acc[r][q], activations, weights[q]);
      }
      codes += kLineK * sizeof(std::int16_t);
      line += kLineBytes;
    }
  }
  std::int32_t* const out = tile.acc + strip * kStripColumns + first_quarter * 4;
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int q = 0; q < kQuarters; q += 2) {
      const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][q], acc[r][q + 1]), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * tile.acc_stride + 4 * q), sums);
    }
  }
}

// 12 accumulators fit in 16 registers beside their operands: a whole strip for 1 or 2 rows, else half a strip at a time.
template <int kRows>
void multiply_rows(const TileProduct& tile) {
  for (int strip = 0; strip < tile.strip_count; ++strip) {
    if constexpr (kRows <= 2) {
      multiply_quarters<kRows, 4>(tile, strip, 0);
    } else {
      multiply_quarters<kRows, 2>(tile, strip, 0);
      multiply_quarters<kRows, 2>(tile, strip, 2);
    }
  }
}

void multiply(const TileProduct& tile) {
  switch (tile.m) {
    case 1: return multiply_rows<1>(tile);
    case 2: return multiply_rows<2>(tile);
    case 3: return multiply_rows<3>(tile);
    case 4: return multiply_rows<4>(tile);
    case 5: return multiply_rows<5>(tile);
    default: return multiply_rows<6>(tile);
  }
}

void widen_row(const std::uint8_t* codes, std::int64_t count, std::int16_t* out) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_cvtepu8_epi16(bytes));
  }
  for (; i < count; ++i) out[i] = codes[i];
}

inline __m256i load_sums(const std::int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// 256 * high + low, rounded once: exact in double.
inline __m256 joined(__m256i high, __m256i low) {
  const auto half = [](__m128i h, __m128i l) {
    return _mm256_cvtpd_ps(_mm256_fmadd_pd(_mm256_set1_pd(256.0), _mm256_cvtepi32_pd(h), _mm256_cvtepi32_pd(l)));
  };
  return _mm256_set_m128(half(_mm256_extracti128_si256(high, 1), _mm256_extracti128_si256(low, 1)),
                         half(_mm256_castsi256_si128(high), _mm256_castsi256_si128(low)));
}

// The exact sums of 8 outputs of row i from column j on, rounded once.
template <Sums kSums>
inline __m256 rounded_sums(const Epilogue& e, int i, int j, __m256i correction) {
  if constexpr (kSums == Sums::wide) {
    const double* const wide = e.wide + i * e.acc_stride + j;
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(wide + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(wide)));
  }
  const std::int32_t* const acc = e.acc + (kSums == Sums::planes ? 2 * i : i) * e.acc_stride + j;
  const __m256i sum = _mm256_sub_epi32(load_sums(acc), correction);
  return kSums == Sums::planes ? joined(sum, load_sums(acc + e.acc_stride)) : _mm256_cvtepi32_ps(sum);
}

// Columns outside, so that what belongs to 8 columns is loaded once for all rows; their correction changes only where
// two rows differ in zero point, which symmetric rows never do.
template <FloatType kType, Sums kSums>
void epilogue_rows(const Epilogue& e) {
  for (int j = 0; j < e.n; j += 8) {
    const __m256i lanes = first(e.n - j);
    const __m256i column_sum = _mm256_maskload_epi32(e.column_sum + j, lanes);
    const __m256 column_scale = _mm256_maskload_ps(e.column_scale + j, lanes);
    const __m256 bias = e.bias ? _mm256_maskload_ps(e.bias + j, lanes) : _mm256_setzero_ps();
    std::int32_t zero_point = kSums == Sums::planes ? 128 : e.rows[0].zero_point;
    __m256i correction = _mm256_mullo_epi32(_mm256_set1_epi32(zero_point), column_sum);
    for (int i = 0; i < e.m; ++i) {
      if (kSums == Sums::plain && e.rows[i].zero_point != zero_point) {
        zero_point = e.rows[i].zero_point;
        correction = _mm256_mullo_epi32(_mm256_set1_epi32(zero_point), column_sum);
      }
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(e.rows[i].scale), column_scale);
      const __m256 y = _mm256_fmadd_ps(rounded_sums<kSums>(e, i, j, correction), scale, bias);
      store_lanes<kType>(e.out, i * e.out_stride + j, e.n - j, y);
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
inline __m256i magnitude(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

inline std::int32_t largest_of(__m256i values) {
  std::int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), values);
  std::int32_t largest = lanes[0];
  for (int i = 1; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

template <FloatType kType>
float absmax_of(const void* x, std::int64_t count) {
  __m256i largest[4];
  OCTAVO_UNROLL for (auto& part : largest) part = _mm256_setzero_si256();
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) {
      largest[v] = _mm256_max_epi32(largest[v], magnitude(load_lanes<kType>(x, i + 8 * v, 8)));
    }
  }
  for (; i < count; i += 8) largest[0] = _mm256_max_epi32(largest[0], magnitude(load_lanes<kType>(x, i, count - i)));
  largest[0] = _mm256_max_epi32(_mm256_max_epi32(largest[0], largest[1]), _mm256_max_epi32(largest[2], largest[3]));
  const std::int32_t bits = largest_of(largest[0]);
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

float absmax(const void* x, FloatType type, std::int64_t count) {
  return with_type(type, [&](auto constant) { return absmax_of<constant.value>(x, count); });
}

template <FloatType kType>
RowRange min_max_of(const void* x, std::int64_t count) {
  __m256 least = _mm256_setzero_ps(), most = least;
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < count; i += 8) {
    const __m256 value = load_lanes<kType>(x, i, count - i);
    least = _mm256_min_ps(value, least);
    most = _mm256_max_ps(value, most);
    largest = _mm256_max_epi32(largest, magnitude(value));
  }
  if (largest_of(largest) >= kInfinity) return {__builtin_nanf(""), __builtin_nanf("")};
  float least_lanes[8], most_lanes[8];
  _mm256_storeu_ps(least_lanes, least);
  _mm256_storeu_ps(most_lanes, most);
  RowRange range{0.0f, 0.0f};
  for (int i = 0; i < 8; ++i) {
    range.min = least_lanes[i] < range.min ? least_lanes[i] : range.min;
    range.max = most_lanes[i] > range.max ? most_lanes[i] : range.max;
  }
  return range;
}

RowRange min_max(const void* x, FloatType type, std::int64_t count) {
  return with_type(type, [&](auto constant) { return min_max_of<constant.value>(x, count); });
}

// Multiples of 1 / inverse_scale within [low, high], rounded half to even, NaN as 0.
struct Steps {
  __m256 inverse_scale, low, high;

  __m256i of(__m256 x) const {
    const __m256 steps = _mm256_mul_ps(x, inverse_scale);
    const __m256 ordered = _mm256_and_ps(steps, _mm256_cmp_ps(steps, steps, _CMP_ORD_Q));
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(ordered, low), high));
  }
};

inline Steps steps_within(float inverse_scale, std::int32_t low, std::int32_t high) {
  return {_mm256_set1_ps(inverse_scale), _mm256_set1_ps(static_cast<float>(low)),
          _mm256_set1_ps(static_cast<float>(high))};
}

// 32 int16 in two vectors, as vpackssdw left them (2 lanes interleaved) -> 32 bytes in order.
inline __m256i pack_bytes(__m256i a, __m256i b) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
}

inline void store_low_bytes(std::uint8_t* to, std::int64_t count, __m256i values) {
  std::int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), values);
  for (std::int64_t i = 0; i < count && i < 8; ++i) to[i] = static_cast<std::uint8_t>(lanes[i]);
}

template <FloatType kType>
bool quantize_row_of(const QuantizeRow& row) {
  const Steps steps = steps_within(row.inverse_scale, row.qmin - row.zero_point, row.qmax - row.zero_point);
  const __m256i zero_point = _mm256_set1_epi16(static_cast<short>(row.zero_point));
  const __m256i low_byte = _mm256_set1_epi16(0xff);
  __m256i largest = _mm256_setzero_si256();
  const auto steps_of = [&](std::int64_t i, std::int64_t count) {
    const __m256 x = load_lanes<kType>(row.x, i, count);
    largest = _mm256_max_epi32(largest, magnitude(x));
    return steps.of(x);
  };
  std::int64_t i = 0;
  for (; i + 32 <= row.count; i += 32) {
    __m256i q[4];
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) q[v] = steps_of(i + 8 * v, 8);
    const __m256i a = _mm256_add_epi16(_mm256_packs_epi32(q[0], q[1]), zero_point);
    const __m256i b = _mm256_add_epi16(_mm256_packs_epi32(q[2], q[3]), zero_point);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.codes + i),
                        pack_bytes(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte)));
  }
  for (; i < row.count; i += 8) {
    const __m256i q = steps_of(i, row.count - i);
    store_low_bytes(row.codes + i, row.count - i, _mm256_add_epi32(q, _mm256_set1_epi32(row.zero_point)));
  }
  return largest_of(largest) < kInfinity;
}

bool quantize_row(const QuantizeRow& row) {
  return with_type(row.type, [&](auto type) { return quantize_row_of<type.value>(row); });
}

template <FloatType kType>
void split_row_of(const SplitRow& row) {
  const Steps steps = steps_within(row.inverse_scale, -kMax16, kMax16);
  const __m256i middle = _mm256_set1_epi16(128), low_byte = _mm256_set1_epi16(0xff);
  const auto high_byte = [&](__m256i q) { return _mm256_add_epi16(_mm256_srai_epi16(q, 8), middle); };
  std::int64_t i = 0;
  for (; i + 32 <= row.count; i += 32) {
    __m256i q[4];
    OCTAVO_UNROLL for (int v = 0; v < 4; ++v) q[v] = steps.of(load_lanes<kType>(row.x, i + 8 * v, 8));
    const __m256i a = _mm256_packs_epi32(q[0], q[1]), b = _mm256_packs_epi32(q[2], q[3]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.high + i), pack_bytes(high_byte(a), high_byte(b)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.low + i),
                        pack_bytes(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte)));
  }
  for (; i < row.count; i += 8) {
    const __m256i q = steps.of(load_lanes<kType>(row.x, i, row.count - i));
    const __m256i high = _mm256_add_epi32(_mm256_srai_epi32(q, 8), _mm256_set1_epi32(128));
    store_low_bytes(row.high + i, row.count - i, high);
    store_low_bytes(row.low + i, row.count - i, q);
  }
}

void split_row(const SplitRow& row) {
  with_type(row.type, [&](auto type) { split_row_of<type.value>(row); });
}

inline __m256i load_codes(const std::uint8_t* from, std::int64_t count, bool is_signed) {
  std::uint8_t padded[8] = {};
  if (count < 8) {
    for (std::int64_t i = 0; i < count; ++i) padded[i] = from[i];
    from = padded;
  }
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
}

template <FloatType kType>
void dequantize_row_of(const DequantizeRow& row) {
  const __m256 scale = _mm256_set1_ps(row.scale);
  const __m256i zero_point = _mm256_set1_epi32(row.zero_point);
  for (std::int64_t i = 0; i < row.count; i += 8) {
    const __m256i code = load_codes(row.codes + i, row.count - i, row.is_signed);
    const __m256 steps = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero_point));
    store_lanes<kType>(row.out, i, row.count - i, _mm256_mul_ps(steps, scale));
  }
}

void dequantize_row(const DequantizeRow& row) {
  with_type(row.type, [&](auto type) { dequantize_row_of<type.value>(row); });
}

}  // namespace

extern const Kernel kernel_scalar;

static constexpr Kernel make_table() {
  Kernel table{};
  table.name = "avx2";
  table.rank = 10;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c;
  table.base = &kernel_scalar;
  table.form = RowForm::s16;
  table.tile = {6, 1};
  table.multiply = multiply;
  table.epilogue = epilogue;
  table.widen_row = widen_row;
  table.absmax = absmax;
  table.min_max = min_max;
  table.quantize_row = quantize_row;
  table.split_row = split_row;
  table.dequantize_row = dequantize_row;
  return table;
}

extern constexpr Kernel kernel_avx2 = make_table();

}  // namespace octavo
