// SPDX-License-Identifier: Apache-2.0
// Lines of codes and exact sums of 16 columns, each in two ymm registers. Dot products are in lines_avx_vnni.h and
// lines_avx2.h.
#pragma once

#include "isa/float/vector/vector_avx2.h"

namespace octavo {
namespace {

// 64 unsigned bytes: 16 columns x 4 k.
struct Line {
  __m256i low, high;
};

inline __m256i load_half(const std::uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Line load_line(const std::uint8_t* from) { return {load_half(from), load_half(from + 32)}; }
inline void store_line(std::uint8_t* to, const Line& line) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), line.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), line.high);
}

template <class F>
inline Line each_half(const Line& a, const F& f) {
  return {f(a.low), f(a.high)};
}

// Each byte's lowest bits, by a mask of up to 15. The mask is read from memory: tiles have no register left for it.
struct alignas(32) HalfLine {
  std::uint8_t bytes[32];
};
constexpr HalfLine repeated(int byte) {
  HalfLine half{};
  for (std::uint8_t& each : half.bytes) each = static_cast<std::uint8_t>(byte);
  return half;
}
constexpr HalfLine kMasks[] = {repeated(0),  repeated(1),  repeated(2),  repeated(3), repeated(4),  repeated(5),
                               repeated(6),  repeated(7),  repeated(8),  repeated(9), repeated(10), repeated(11),
                               repeated(12), repeated(13), repeated(14), repeated(15)};
inline Line masked(const Line& a, int mask) {
  return each_half(a, [&](__m256i half) {
    asm("vpand %1, %0, %0" : "+x"(half) : "m"(kMasks[mask]));
    return half;
  });
}
inline Line either(const Line& a, const Line& b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline Line with_flipped_sign(const Line& a) {
  return each_half(a, [](__m256i half) { return _mm256_xor_si256(half, _mm256_set1_epi8(-128)); });
}
inline Line lowered(const Line& a, int by) {
  return each_half(a, [&](__m256i half) { return _mm256_sub_epi8(half, _mm256_set1_epi8(static_cast<char>(by))); });
}

// All bits move, from one byte of a pair to the other one as well: `masked` removes these.
template <int kBits>
inline Line shifted_right(const Line& a) {
  return each_half(a, [](__m256i half) { return _mm256_srli_epi16(half, kBits); });
}
template <int kBits>
inline Line shifted_left(const Line& a) {
  return each_half(a, [](__m256i half) { return _mm256_slli_epi16(half, kBits); });
}

// table[code], where `table` is what load_table returns.
inline Line load_table(const std::uint8_t* table) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {both, both};
}
inline Line looked_up(const Line& table, const Line& codes) {
  return each_half(codes, [&](__m256i half) { return _mm256_shuffle_epi8(table.low, half); });
}

// The exact sums of 16 columns.
struct ColumnSums {
  __m256i low, high;
};
inline void start(ColumnSums& sums, std::int32_t value) { sums.low = sums.high = _mm256_set1_epi32(value); }

inline Vector rounded(const ColumnSums& sums) { return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)}; }
inline Vector rounded(const ColumnSums& high, const ColumnSums& low) {
  const auto joined = [](__m256i h, __m256i l) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(h, 8), l));
  };
  return {joined(high.low, low.low), joined(high.high, low.high)};
}

// The sums of the signed codes of 4 units.
inline void sum_4_units(const std::int8_t* codes, std::int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * half));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));  // 4 lanes for each unit
    fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xb1));
    fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4e));
    sums[2 * half] = _mm256_extract_epi32(fours, 0);
    sums[2 * half + 1] = _mm256_extract_epi32(fours, 4);
  }
}

}  // namespace
}  // namespace octavo
