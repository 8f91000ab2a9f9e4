// SPDX-License-Identifier: Apache-2.0
// vpdpbusd on ymm registers: products of unsigned codes and signed activations are added up in int32.
#pragma once

#include "lines_ymm.h"

// The tests compile avx_vnni.cpp once more with the EVEX encoding of vpdpbusd, for CPUs that have AVX512-VNNI but not AVX-VNNI.
#ifndef OCTAVO_VPDPBUSD
#define OCTAVO_VPDPBUSD "%{vex%} vpdpbusd"
#endif

namespace octavo {
namespace {

// 4 activations, for all columns.
struct Four {
  __m256i bytes;
};
inline Four load_four(const char* codes) {
  std::int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return {_mm256_set1_epi32(word)};
}

// Sums of words, which AVX2 needs on the way, do not exist here.
constexpr bool kAddsInWords = false;
using WordSums = ColumnSums;

inline void dot(ColumnSums& sums, const Line& codes, const Four& activations) {
  asm(OCTAVO_VPDPBUSD " %2, %1, %0" : "+x"(sums.low) : "x"(codes.low), "x"(activations.bytes));
  asm(OCTAVO_VPDPBUSD " %2, %1, %0" : "+x"(sums.high) : "x"(codes.high), "x"(activations.bytes));
}

}  // namespace
}  // namespace octavo
