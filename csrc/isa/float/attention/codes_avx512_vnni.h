// SPDX-License-Identifier: Apache-2.0
// A word holds four 8-bit codes. vpdpbusd multiplies uint8 by int8, so 128 is added to the codes of keys.
#pragma once

#include "isa/float/tile/tile.h"

namespace octavo {
namespace {

struct CodeWords {
  static constexpr int kPerWord = 4;

  // isa/float/tile/tile_avx512.h says why the instructions are written in asm. Queries are signed and keys unsigned; weights
  // are unsigned and values signed.
  struct MultiplyKeys {
    static void add(Vector& acc, const Vector& query, const Vector& key) {
      asm("vpdpbusd %2, %1, %0" : "+v"(acc.lanes) : "v"(key.lanes), "v"(query.lanes));
    }
  };
  struct MultiplyWeights {
    static void add(Vector& acc, const Vector& weight, const Vector& value) {
      asm("vpdpbusd %2, %1, %0" : "+v"(acc.lanes) : "v"(weight.lanes), "v"(value.lanes));
    }
  };

  static Vector key_offset() { return vector_of(_mm512_set1_epi8(-128)); }
  static Vector as_keys(const Vector& words) {
    return vector_of(_mm512_xor_si512(_mm512_castps_si512(words.lanes), _mm512_set1_epi8(-128)));
  }

  // 16 words of 64 successive numbers, which are rounded half to even: -127 .. 127 if signed, 0 .. 255 if unsigned.
  static Vector signed_words(const Vector (&parts)[4]) {
    return in_order(_mm512_packs_epi16(halves(parts[0], parts[1]), halves(parts[2], parts[3])));
  }
  static Vector unsigned_words(const Vector (&parts)[4]) {
    return in_order(_mm512_packus_epi16(halves(parts[0], parts[1]), halves(parts[2], parts[3])));
  }

  // 16 words. Word i holds number i of each row, -127 .. 127.
  static Vector stack(const Vector (&rows)[4]) {
    const __m512i low = pair(integers(rows[0]), integers(rows[2])), high = pair(integers(rows[1]), integers(rows[3]));
    return vector_of(_mm512_mask_mov_epi8(low, 0xaaaaaaaaaaaaaaaa, _mm512_slli_epi16(high, 8)));
  }

  static Vector reals(const Vector& sums) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(sums.lanes))}; }

 private:
  static Vector vector_of(__m512i words) { return {_mm512_castsi512_ps(words)}; }
  static __m512i integers(const Vector& a) { return _mm512_cvtps_epi32(a.lanes); }
  static __m512i halves(const Vector& a, const Vector& b) { return _mm512_packs_epi32(integers(a), integers(b)); }

  // Packing has left four numbers of each part together; this brings all numbers into their order.
  static Vector in_order(__m512i words) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return vector_of(_mm512_permutexvar_epi32(order, words));
  }

  static __m512i pair(__m512i low, __m512i high) {
    return _mm512_mask_mov_epi16(low, 0xaaaaaaaa, _mm512_slli_epi32(high, 16));
  }
};

}  // namespace
}  // namespace octavo
