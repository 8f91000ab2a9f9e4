// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512vnni
// vpdpbusd on 64 bytes.
#include <immintrin.h>

#include "ceilings.h"

namespace {

// Through memory: g++ 12 warns about the register casts of its own header.
int first_lane(__m512i sum) {
  alignas(64) int lanes[16];
  _mm512_store_si512(lanes, sum);
  return lanes[0];
}

}  // namespace

double multiply_avx512_vnni() {
  constexpr int kSums = 16, kRepeats = 20000;
  __m512i sums[kSums];
  const __m512i a = _mm512_set1_epi32(0x03030303), b = _mm512_set1_epi32(-0x05050505);
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_si512();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) asm("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(a), "v"(b));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sink = sink + first_lane(sums[i]);
  return 2.0 * 64 * kSums * kRepeats;
}

int read_avx512(const char* data, std::size_t bytes) {
  __m512i sums[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) sums[j] = _mm512_setzero_si512();
  for (std::size_t i = 0; i < bytes; i += sizeof sums) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(data + i + 64 * j));
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
  return first_lane(sums[0]);
}
