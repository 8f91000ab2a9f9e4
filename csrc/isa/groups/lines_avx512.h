// SPDX-License-Identifier: Apache-2.0
// Lines of codes and exact sums of 16 columns, each in one zmm register.
#pragma once

#include "isa/float/vector/vector_avx512.h"

namespace octavo {
namespace {

// 64 unsigned bytes: 16 columns x 4 k.
struct Line {
  __m512i bytes;
};

inline Line load_line(const std::uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store_line(std::uint8_t* to, const Line& line) { _mm512_storeu_si512(to, line.bytes); }
inline Line masked(const Line& a, int mask) {
  return {_mm512_and_si512(a.bytes, _mm512_set1_epi8(static_cast<char>(mask)))};
}
inline Line either(const Line& a, const Line& b) { return {_mm512_or_si512(a.bytes, b.bytes)}; }
inline Line with_flipped_sign(const Line& a) { return {_mm512_xor_si512(a.bytes, _mm512_set1_epi8(-128))}; }

inline Line lowered(const Line& a, int by) {
  return {_mm512_sub_epi8(a.bytes, _mm512_set1_epi8(static_cast<char>(by)))};
}

// All bits move, from one byte of a pair to the other one as well: `masked` removes these.
template <int kBits>
inline Line shifted_right(const Line& a) {
  return {_mm512_srli_epi16(a.bytes, kBits)};
}
template <int kBits>
inline Line shifted_left(const Line& a) {
  return {_mm512_slli_epi16(a.bytes, kBits)};
}

// table[code], where `table` is what load_table returns.
inline Line load_table(const std::uint8_t* table) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))};
}
inline Line looked_up(const Line& table, const Line& codes) { return {_mm512_shuffle_epi8(table.bytes, codes.bytes)}; }

// 4 activations, for all columns.
struct Four {
  __m512i bytes;
};
inline Four load_four(const char* codes) {
  std::int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return {_mm512_set1_epi32(word)};
}

// The exact sums of 16 columns.
struct ColumnSums {
  __m512i lanes;
};
inline void start(ColumnSums& sums, std::int32_t value) { sums.lanes = _mm512_set1_epi32(value); }

// Sums of words, which AVX2 needs on the way, do not exist here.
constexpr bool kAddsInWords = false;
using WordSums = ColumnSums;

// Written in asm for the reason that isa/integer/avx512_vnni.cpp gives.
inline void dot(ColumnSums& sums, const Line& codes, const Four& activations) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.lanes) : "v"(codes.bytes), "v"(activations.bytes));
}

inline Vector rounded(const ColumnSums& sums) { return {_mm512_cvtepi32_ps(sums.lanes)}; }
inline Vector rounded(const ColumnSums& high, const ColumnSums& low) {
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high.lanes, 8), low.lanes))};
}

// The sums of the signed codes of 4 units.
inline void sum_4_units(const std::int8_t* codes, std::int32_t* sums) {
  __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(codes));
  fours = _mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_CDAB));
  fours = _mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_BADC));
  _mm512_mask_compressstoreu_epi32(sums, 0x1111, fours);
}

}  // namespace
}  // namespace octavo
