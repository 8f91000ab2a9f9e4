// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bf16
// vfmadd231ps on 16 floats, and vdpbf16ps on 32 pairs of bfloat16.
#include <immintrin.h>

#include "ceilings.h"

namespace {

constexpr int kSums = 16, kRepeats = 20000;

// Returns what `add` did to each sum in turn, `operations` at a time.
template <class Add>
double repeated(double operations, const Add& add) {
  __m512 sums[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_ps();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) add(sums[i]);
  }
  float lanes[16];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) {
    _mm512_storeu_ps(lanes, sums[i]);
    sink = sink + static_cast<int>(lanes[0]);
  }
  return operations * kSums * kRepeats;
}

}  // namespace

double multiply_float_avx512() {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1e-3f);
  return repeated(2.0 * 16, [=](__m512& sum) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); });
}

double multiply_bfloat16_avx512() {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1e-3f);  // read as pairs of bfloat16
  return repeated(2.0 * 32, [=](__m512& sum) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); });
}
