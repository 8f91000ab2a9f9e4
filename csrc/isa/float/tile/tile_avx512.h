// SPDX-License-Identifier: Apache-2.0
// Tiles have 24 zmm accumulators.
#pragma once

#include "isa/float/vector/vector_avx512.h"

namespace octavo {
namespace {

constexpr int kTileVectors = 4;
constexpr int tile_rows(int vectors) { return vectors <= 2 ? 12 : 6; }

// The instruction is written in asm because g++ 12 moves the accumulators of the intrinsic through the stack when a tile has
// 24 of them.
inline void add_product(Vector& acc, const Vector& a, const Vector& b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc.lanes) : "v"(a.lanes), "v"(b.lanes));
}

// score + bias, but -Inf where bias is -Inf, whatever the score is.
inline Vector add_bias(const Vector& score, const Vector& bias) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  const __mmask16 hidden = _mm512_cmp_ps_mask(bias.lanes, never, _CMP_EQ_OQ);
  return {_mm512_mask_mov_ps(_mm512_add_ps(score.lanes, bias.lanes), hidden, never)};
}

// 0 in lanes where the byte of mask[i ...] is not 0, otherwise -Inf. Lanes from `count` on are -Inf.
inline Vector bias_of_bytes(const void* mask, std::int64_t i, std::int64_t count) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first(count), static_cast<const unsigned char*>(mask) + i);
  const __mmask16 look = _mm_test_epi8_mask(bytes, bytes);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), look, _mm512_setzero_ps())};
}

// Exchanges lane j of rows[i] and lane i of rows[j].
inline void transpose(Vector (&rows)[16]) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].lanes, rows[i + 1].lanes);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].lanes, rows[i + 1].lanes);
  }
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int half = 0; half < 16; half += 8) {
    for (int j = 0; j < 4; ++j) {
      pairs[half + j] = _mm512_shuffle_f32x4(fours[half + j], fours[half + j + 4], 0x88);
      pairs[half + j + 4] = _mm512_shuffle_f32x4(fours[half + j], fours[half + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    rows[j].lanes = _mm512_shuffle_f32x4(pairs[j], pairs[j + 8], 0x88);
    rows[j + 8].lanes = _mm512_shuffle_f32x4(pairs[j], pairs[j + 8], 0xdd);
  }
}

}  // namespace
}  // namespace octavo
