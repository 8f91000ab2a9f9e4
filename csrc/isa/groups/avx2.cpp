// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c -Wno-maybe-uninitialized -Wno-uninitialized
// vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in int16. With codes of at most 127 a pair is exact;
// with codes of at most 4 bits, 8 of them can be added before they are widened to int32, which is the fastest way that AVX2
// has. Codes of 8 bits are multiplied as words, by vpmaddwd, in product_of_words.h.
//
// Packed codes are read directly by any number of rows: unpacking them into the cache first was no faster for 4 and 2 bits
// (Zen 3), only for 3. Weights are prefetched 6 KB ahead.
#include "lines_avx2.h"

namespace octavo {
namespace {

constexpr int kPrefetchBytes = 6144, kPrefetchRows = 6, kStripsOfOneRow = 1;

constexpr bool kAddsInWords = true;

struct alignas(32) Words {
  std::int16_t words[16];
};
constexpr Words kOnes = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};

// Sums of pairs of k for 16 columns, int16.
struct WordSums {
  __m256i low, high;
};

// 4 activations in memory. Each dot product reads them by itself, in one asm statement with all that it does: g++ 12 otherwise
// loads activations long before they are needed, and moves accumulators through the stack for lack of registers.
struct Four {
  char bytes[4];
};
inline const Four& load_four(const char* codes) { return *reinterpret_cast<const Four*>(codes); }

inline void dot(WordSums& words, const Line& codes, const Four& activations) {
  __m256i pairs, fours;
  asm("vpbroadcastd %4, %3\n\t"
      "vpmaddubsw %3, %5, %2\n\tvpaddw %2, %0, %0\n\t"
      "vpmaddubsw %3, %6, %2\n\tvpaddw %2, %1, %1"
      : "+x"(words.low), "+x"(words.high), "=&x"(pairs), "=&x"(fours)
      : "m"(activations), "x"(codes.low), "x"(codes.high));
}

inline void dot_first(WordSums& words, const Line& codes, const Four& activations) {
  __m256i fours;
  asm("vpbroadcastd %3, %2\n\tvpmaddubsw %2, %4, %0\n\tvpmaddubsw %2, %5, %1"
      : "=&x"(words.low), "=&x"(words.high), "=&x"(fours)
      : "m"(activations), "x"(codes.low), "x"(codes.high));
}

inline void dot(ColumnSums& sums, const Line& codes, const Four& activations) {
  __m256i pairs, fours;
  asm("vpbroadcastd %4, %3\n\t"
      "vpmaddubsw %3, %5, %2\n\tvpmaddwd %7, %2, %2\n\tvpaddd %2, %0, %0\n\t"
      "vpmaddubsw %3, %6, %2\n\tvpmaddwd %7, %2, %2\n\tvpaddd %2, %1, %1"
      : "+x"(sums.low), "+x"(sums.high), "=&x"(pairs), "=&x"(fours)
      : "m"(activations), "x"(codes.low), "x"(codes.high), "m"(kOnes));
}

inline ColumnSums widened(const WordSums& words) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(words.low, ones), _mm256_madd_epi16(words.high, ones)};
}

inline void add(ColumnSums& sums, const ColumnSums& others) {
  sums.low = _mm256_add_epi32(sums.low, others.low);
  sums.high = _mm256_add_epi32(sums.high, others.high);
}

}  // namespace
}  // namespace octavo

#include "product_of_words.h"
#include "rows.h"
#include "tiles_of_ymm.h"

namespace octavo {
namespace {

void multiply(const GroupProduct& p) { p.codes.bits == 8 ? multiply_words(p) : multiply_packed(p); }

}  // namespace

extern const GroupKernel group_kernel_scalar;

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "avx2";
  table.rank = 10;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c;
  table.base = &group_kernel_scalar;
  table.largest_byte_code = 127;
  table.rows = kRows;
  table.rows_of_planes = kRowsOfPlanes;
  table.panel_rows = 1 << 30;
  table.multiply = multiply;
  table.unpack_strip = unpack_strip;
  table.quantize_groups = quantize_groups;
  table.sum_units = sum_units;
  return table;
}

extern constexpr GroupKernel group_kernel_avx2 = make_table();

}  // namespace octavo
