// SPDX-License-Identifier: Apache-2.0
// Codes of one to four bits in the bytes of a block. Loops of fixed length, which the compiler turns into vector instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace octavo {

// Byte i holds the codes i, i + kCount, i + 2 * kCount, ...: the first one in the lowest bits.
template <int kBits, int kCount>
void spread_bits(const std::uint8_t* bytes, std::uint8_t* codes) {
  for (int part = 0; part < 8 / kBits; ++part) {
    for (int i = 0; i < kCount; ++i) {
      codes[part * kCount + i] = static_cast<std::uint8_t>(bytes[i] >> (part * kBits) & ((1 << kBits) - 1));
    }
  }
}

template <int kBits, int kCount>
void gather_bits(const std::uint8_t* codes, std::uint8_t* bytes) {
  std::memset(bytes, 0, kCount);
  for (int part = 0; part < 8 / kBits; ++part) {
    for (int i = 0; i < kCount; ++i) {
      bytes[i] =
          static_cast<std::uint8_t>(bytes[i] | (codes[part * kCount + i] & ((1 << kBits) - 1)) << (part * kBits));
    }
  }
}

// Bits of neighbours: bit i of 32 belongs to code i, and becomes bit `place` of it.
inline void spread_mask(const std::uint8_t* mask, int place, std::uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>(codes[i] | (mask[i / 8] >> i % 8 & 1) << place);
}

inline void gather_mask(const std::uint8_t* codes, int place, std::uint8_t* mask) {
  std::memset(mask, 0, 4);
  for (int i = 0; i < 32; ++i) {
    mask[i / 8] = static_cast<std::uint8_t>(mask[i / 8] | (codes[i] >> place & 1) << i % 8);
  }
}

inline std::uint16_t read_half(const std::uint8_t* from) {
  std::uint16_t half;
  std::memcpy(&half, from, 2);
  return half;
}
inline void write_half(std::uint8_t* to, std::uint16_t half) { std::memcpy(to, &half, 2); }

}  // namespace octavo
