// SPDX-License-Identifier: Apache-2.0
// Blocks with one scale of 16 bits, and the two of 4-bit floats: up to 256 elements, and nothing on two levels.
#pragma once

#include "bits.h"
#include "blocks.h"

namespace octavo {

// Q4_0, Q4_1, IQ4_NL: d, m if kHalves is 2, then 16 bytes of two codes each.
template <int kHalves>
void take_apart_q4(const std::uint8_t* block, BlockParts& parts) {
  for (int i = 0; i < kHalves; ++i) parts.halves[i] = read_half(block + 2 * i);
  spread_bits<4, 16>(block + 2 * kHalves, parts.codes);
}
template <int kHalves>
void put_together_q4(const BlockParts& parts, std::uint8_t* block) {
  for (int i = 0; i < kHalves; ++i) write_half(block + 2 * i, parts.halves[i]);
  gather_bits<4, 16>(parts.codes, block + 2 * kHalves);
}

// Q5_0, Q5_1: the same with 32 fifth bits in between.
template <int kHalves>
void take_apart_q5(const std::uint8_t* block, BlockParts& parts) {
  for (int i = 0; i < kHalves; ++i) parts.halves[i] = read_half(block + 2 * i);
  spread_bits<4, 16>(block + 2 * kHalves + 4, parts.codes);
  spread_mask(block + 2 * kHalves, 4, parts.codes);
}
template <int kHalves>
void put_together_q5(const BlockParts& parts, std::uint8_t* block) {
  for (int i = 0; i < kHalves; ++i) write_half(block + 2 * i, parts.halves[i]);
  gather_mask(parts.codes, 4, block + 2 * kHalves);
  gather_bits<4, 16>(parts.codes, block + 2 * kHalves + 4);
}

// Q8_0: d, then signed codes; u = code + 128.
inline void take_apart_q8_0(const std::uint8_t* block, BlockParts& parts) {
  parts.halves[0] = read_half(block);
  for (int i = 0; i < 32; ++i) parts.codes[i] = block[2 + i] ^ 128;
}
inline void put_together_q8_0(const BlockParts& parts, std::uint8_t* block) {
  write_half(block, parts.halves[0]);
  for (int i = 0; i < 32; ++i) block[2 + i] = parts.codes[i] ^ 128;
}

// Q1_0: d, then a bit for each of 128 elements, 0 for -d and 1 for d; u = 0 or 2.
inline void take_apart_q1_0(const std::uint8_t* block, BlockParts& parts) {
  parts.halves[0] = read_half(block);
  std::memset(parts.codes, 0, 128);
  for (int i = 0; i < 128; i += 32) spread_mask(block + 2 + i / 8, 1, parts.codes + i);
}
inline void put_together_q1_0(const BlockParts& parts, std::uint8_t* block) {
  write_half(block, parts.halves[0]);
  for (int i = 0; i < 128; i += 32) gather_mask(parts.codes + i, 1, block + 2 + i / 8);
}

// Q2_0: d, then 64 codes, four neighbours in a byte.
inline void take_apart_q2_0(const std::uint8_t* block, BlockParts& parts) {
  parts.halves[0] = read_half(block);
  for (int i = 0; i < 64; ++i) parts.codes[i] = block[2 + i / 4] >> i % 4 * 2 & 3;
}
inline void put_together_q2_0(const BlockParts& parts, std::uint8_t* block) {
  write_half(block, parts.halves[0]);
  for (int i = 0; i < 16; ++i) gather_bits<2, 1>(parts.codes + 4 * i, block + 2 + i);
}

// TQ2_0: twice 32 bytes of four codes each, then d.
inline void take_apart_tq2_0(const std::uint8_t* block, BlockParts& parts) {
  spread_bits<2, 32>(block, parts.codes);
  spread_bits<2, 32>(block + 32, parts.codes + 128);
  parts.halves[0] = read_half(block + 64);
}
inline void put_together_tq2_0(const BlockParts& parts, std::uint8_t* block) {
  gather_bits<2, 32>(parts.codes, block);
  gather_bits<2, 32>(parts.codes + 128, block + 32);
  write_half(block + 64, parts.halves[0]);
}

// TQ1_0: digits of base 3, five in a byte (the last four bytes: four), then d. A byte is the digits as a fraction, rounded up:
// multiplying by 3 brings out one digit after the other. 13 of 256 bytes are no such fractions.
template <int kDigits, int kCount>
void spread_digits(const std::uint8_t* bytes, std::uint8_t* codes) {
  int power = 1;
  for (int digit = 0; digit < kDigits; ++digit, power *= 3) {
    for (int i = 0; i < kCount; ++i) {
      codes[digit * kCount + i] = static_cast<std::uint8_t>((bytes[i] * power & 255) * 3 >> 8);
    }
  }
}
template <int kDigits, int kCount>
void gather_digits(const std::uint8_t* codes, std::uint8_t* bytes) {
  for (int i = 0; i < kCount; ++i) {
    int number = 0;
    for (int digit = 0; digit < 5; ++digit) {
      number = 3 * number + (digit < kDigits ? codes[digit * kCount + i] : 0);
    }
    bytes[i] = static_cast<std::uint8_t>((number * 256 + 242) / 243);
  }
}
inline void take_apart_tq1_0(const std::uint8_t* block, BlockParts& parts) {
  spread_digits<5, 32>(block, parts.codes);
  spread_digits<5, 16>(block + 32, parts.codes + 160);
  spread_digits<4, 4>(block + 48, parts.codes + 240);
  parts.halves[0] = read_half(block + 52);
}
inline void put_together_tq1_0(const BlockParts& parts, std::uint8_t* block) {
  gather_digits<5, 32>(parts.codes, block);
  gather_digits<5, 16>(parts.codes + 160, block + 32);
  gather_digits<4, 4>(parts.codes + 240, block + 48);
  write_half(block + 52, parts.halves[0]);
}

// MXFP4: an exponent, then 16 bytes of two codes each.
inline void take_apart_mxfp4(const std::uint8_t* block, BlockParts& parts) {
  parts.scale[0] = block[0];
  spread_bits<4, 16>(block + 1, parts.codes);
}
inline void put_together_mxfp4(const BlockParts& parts, std::uint8_t* block) {
  block[0] = parts.scale[0];
  gather_bits<4, 16>(parts.codes, block + 1);
}

// NVFP4: four scales, then 8 bytes for each of four groups of 16.
inline void take_apart_nvfp4(const std::uint8_t* block, BlockParts& parts) {
  std::memcpy(parts.scale, block, 4);
  for (int group = 0; group < 4; ++group) spread_bits<4, 8>(block + 4 + 8 * group, parts.codes + 16 * group);
}
inline void put_together_nvfp4(const BlockParts& parts, std::uint8_t* block) {
  std::memcpy(block, parts.scale, 4);
  for (int group = 0; group < 4; ++group) gather_bits<4, 8>(parts.codes + 16 * group, block + 4 + 8 * group);
}

}  // namespace octavo
