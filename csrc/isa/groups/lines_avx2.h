// SPDX-License-Identifier: Apache-2.0
// The dot products of lines_ymm.h for AVX2, which has none that takes every pair of bytes.
#pragma once

#include "lines_ymm.h"

namespace octavo {
namespace {

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
