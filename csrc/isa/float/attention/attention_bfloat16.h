// SPDX-License-Identifier: Apache-2.0
// Attention with products of bfloat16: vdpbf16ps multiplies two pairs of numbers where vfmadd231ps multiplies one.
#pragma once

#include "attention.h"

namespace octavo {
namespace {

// Adds both products of each lane, one after the other. isa/float/tile/tile_avx512.h says why the instruction is
// written in asm.
struct MultiplyPairs {
  static void add(Vector& acc, const Vector& a, const Vector& b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc.lanes) : "v"(a.lanes), "v"(b.lanes));
  }
};

// Rounds half to even. Subnormal numbers become 0.
inline __m512i bfloat16_words(const Vector& a) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.lanes)));
}

struct PairProducts {
  using Multiply = MultiplyPairs;
  static constexpr int kPerWord = 2;

  static Vector power(const Vector& x) { return exp2_coarse(x); }

  static Vector join(const Vector (&parts)[2]) {
    return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(parts[1].lanes, parts[0].lanes))};
  }

  static Vector stack(const Vector (&rows)[2]) {
    const __m512i high = _mm512_slli_epi32(bfloat16_words(rows[1]), 16);
    return {_mm512_castsi512_ps(_mm512_or_si512(high, bfloat16_words(rows[0])))};
  }
};

inline void attention_bfloat16(const Attention& a) { attend<PairProducts>(a); }

}  // namespace
}  // namespace octavo
