// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c
// The product uses vpmaddwd on int16, which is exact for every pair of codes. vpmaddubsw on bytes needs fewer instructions,
// but it saturates (255 * 127 * 2 > 32,767). So activation rows arrive as int16, and weights are widened when they are loaded.
// bytes_product_avx2.h has the product of bytes, for weights in which few sums can saturate.
//
// A quarter of a line (4 columns x 4 k) fills a ymm register of int16. It is multiplied by 4 activations, which are broadcast
// as one 64-bit word. Each column thus has two int32 lanes, which are added at the very end. The whole layer runs at 86 % of
// what vpmaddwd and vpaddd allow (256 x 4096 x 4096, Zen 4).
#include <immintrin.h>

#include "bytes_product_avx2.h"
#include "rows.h"

namespace octavo {
namespace {

constexpr int kQuarterBytes = kLineBytes / 4;

// One asm statement for both instructions, because g++ 12 otherwise moves accumulators through the stack.
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

// Multiplies 4 * kQuarters columns of one strip, from column 4 * first_quarter on.
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

// 12 accumulators fit in 16 registers beside their operands: enough for a whole strip and up to 2 rows, or for half a strip
// and up to 6 rows.
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

// 256 * high + low, which is exact in double, rounded once.
inline __m256 joined(__m256i high, __m256i low) {
  const auto half = [](__m128i h, __m128i l) {
    return _mm256_cvtpd_ps(_mm256_fmadd_pd(_mm256_set1_pd(256.0), _mm256_cvtepi32_pd(h), _mm256_cvtepi32_pd(l)));
  };
  return _mm256_set_m128(half(_mm256_extracti128_si256(high, 1), _mm256_extracti128_si256(low, 1)),
                         half(_mm256_castsi256_si128(high), _mm256_castsi256_si128(low)));
}

// The exact sums of 8 outputs in row i, from column j on, rounded once.
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

// The loop over columns is the outer one, so that what belongs to 8 columns is loaded once for all rows. The correction of
// these columns changes only where two rows have different zero points, and symmetric rows never do.
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

static constexpr Kernel make_byte_table() {
  Kernel table = make_table();
  table.form = RowForm::u8;
  table.multiply = multiply_bytes;
  return table;
}

static constexpr Kernel kByteKernel = make_byte_table();

static constexpr Kernel with_byte_kernel() {
  Kernel table = make_table();
  table.byte_kernel = &kByteKernel;
  return table;
}

extern constexpr Kernel kernel_avx2 = with_byte_kernel();

}  // namespace octavo
