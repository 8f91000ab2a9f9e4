// SPDX-License-Identifier: Apache-2.0
// How a packed weight lies in memory: the layouts "S16" of codes and "H16" of 16-bit floats, which every instruction set reads.
//
// S16, which drivers/pack.cpp writes.
//
// A weight of n rows and k columns, int8, is cut into strips of 16 rows of the weight, which are 16 columns of the
// product. Each strip is contiguous over all of k:
//
//   strip 0                      strip 1                ...      [n / 16]
//   +--------+--------+-- ...    +--------+-- ...
//   | tile 0 | tile 1 |          | tile 0 |                      [k / 64]  a tile is 64 k x 16 columns, 1024 bytes
//   +--------+--------+-- ...    +--------+-- ...
//
//   tile = 16 lines of 64 bytes; line j holds k = 4j .. 4j + 3 of all 16 columns, byte 4 * column + (k mod 4):
//   | c0: k k+1 k+2 k+3 | c1: k k+1 k+2 k+3 | ... | c15: k k+1 k+2 k+3 |
//
// A line is one zmm operand of vpdpbusd and half a line is one ymm operand. A quarter of a line widens to one ymm of int16,
// and a whole tile is a B operand of AMX: one layout serves every instruction set. n is padded to a multiple of 16 and k to
// a multiple of 64 with zero codes.
//
// H16, which drivers/half/half_pack.cpp writes. Strips as above; a strip of k lines of 32 bytes holds one k of all 16 columns in each:
//
//   | c0 c1 c2 ... c15 | for k = 0, then for k = 1, ...
//
// A line widens to one zmm or two ymm of float32. n is padded to a multiple of 16 with zeros, k is not padded.
//
// Saturating words. vpmaddubsw, the product of bytes that AVX2 has, adds the products of two adjacent codes in int16. With
// any two activations the sum fits, 255 * 128 < 2^15, unless the two codes add up to more than 128 or to less than -128.
// Weights with few such pairs of codes have a list of the words that hold one, with which AVX2 adds what the sums have lost:
//
//   word w of a strip   the bytes 4w .. 4w + 3: line w / 16, column w mod 16, k = 4 * line .. 4 * line + 3
//   offsets             int32 [strips + 1]: the list of strip s is words[offsets[s]] .. words[offsets[s + 1] - 1]
//   words               uint16, so that k is at most 16,384, in ascending order within a strip
#pragma once

#include <cstdint>

namespace octavo {

constexpr int kStripColumns = 16;
constexpr int kLineK = 4;
constexpr int kTileK = 64;
constexpr int kLineBytes = kStripColumns * kLineK;
constexpr int kTileBytes = kStripColumns * kTileK;

constexpr int kMaxPairSum = 128;

constexpr int kMaxListedK = 65536 / kStripColumns * kLineK;

struct SaturatingWords {
  const std::int32_t* offsets = nullptr;  // null: there is no list
  const std::uint16_t* words = nullptr;
};

}  // namespace octavo
