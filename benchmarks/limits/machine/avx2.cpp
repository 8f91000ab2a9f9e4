// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma
// vpmaddwd and vpaddd on int16: the exact product of AVX2. vpmaddubsw would be twice as fast, and saturates.
#include <immintrin.h>

#include "ceilings.h"

double multiply_avx2() {
  constexpr int kSums = 8, kRepeats = 20000;
  __m256i sums[kSums];
  const __m256i a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(-5);
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_si256();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      __m256i product;
      asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sums[i]), "=&x"(product) : "x"(a), "x"(b));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) sink = sink + _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[i]));
  return 2.0 * 16 * kSums * kRepeats;
}

double multiply_float_avx2() {
  constexpr int kSums = 12, kRepeats = 20000;
  __m256 sums[kSums];
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1e-3f);
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_setzero_ps();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) asm("vfmadd231ps %2, %1, %0" : "+x"(sums[i]) : "x"(a), "x"(b));
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sink = sink + static_cast<int>(_mm256_cvtss_f32(sums[i]));
  return 2.0 * 8 * kSums * kRepeats;
}

int read_avx2(const char* data, std::size_t bytes) {
  __m256i sums[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) sums[j] = _mm256_setzero_si256();
  for (std::size_t i = 0; i < bytes; i += sizeof sums) {
    const __m256i* line = reinterpret_cast<const __m256i*>(data + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = _mm256_xor_si256(sums[j], _mm256_load_si256(line + j));
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
  return _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[0]));
}
