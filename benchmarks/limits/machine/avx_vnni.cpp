// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mavxvnni
// vpdpbusd on 32 bytes, VEX encoding.
#include <immintrin.h>

#include "ceilings.h"

double multiply_avx_vnni() {
  constexpr int kSums = 12, kRepeats = 20000;
  __m256i sums[kSums];
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_si256();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[i]) : "x"(a), "x"(b));
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sink = sink + _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[i]));
  return 2.0 * 32 * kSums * kRepeats;
}
