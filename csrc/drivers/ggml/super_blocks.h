// SPDX-License-Identifier: Apache-2.0
// Blocks of 256 elements with scales on two levels: the K types and IQ4_XS.
#pragma once

#include "bits.h"
#include "blocks.h"

namespace octavo {

// Q2_K: 16 bytes with a scale in the low and a minimum in the high half, 64 bytes of codes, d, m.
inline void take_apart_q2_k(const std::uint8_t* block, BlockParts& parts) {
  std::memcpy(parts.scale, block, 16);
  spread_bits<2, 32>(block + 16, parts.codes);
  spread_bits<2, 32>(block + 48, parts.codes + 128);
  for (int i = 0; i < 2; ++i) parts.halves[i] = read_half(block + 80 + 2 * i);
}
inline void put_together_q2_k(const BlockParts& parts, std::uint8_t* block) {
  std::memcpy(block, parts.scale, 16);
  gather_bits<2, 32>(parts.codes, block + 16);
  gather_bits<2, 32>(parts.codes + 128, block + 48);
  for (int i = 0; i < 2; ++i) write_half(block + 80 + 2 * i, parts.halves[i]);
}

// Q3_K: 32 bytes of third bits, 64 of low bits, 12 of scales of 6 bits plus 32, d.
inline void take_apart_q3_k(const std::uint8_t* block, BlockParts& parts) {
  spread_bits<2, 32>(block + 32, parts.codes);
  spread_bits<2, 32>(block + 64, parts.codes + 128);
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 32; ++i) {
      std::uint8_t& code = parts.codes[32 * part + i];
      code = static_cast<std::uint8_t>(code | (block[i] >> part & 1) << 2);
    }
  }
  const std::uint8_t* const scales = block + 96;
  for (int i = 0; i < 16; ++i) {
    const int low = scales[i % 8] >> i / 8 * 4 & 15, high = scales[8 + i % 4] >> i / 4 * 2 & 3;
    parts.scale[i] = static_cast<std::uint8_t>((low | high << 4) - 32);
  }
  parts.halves[0] = read_half(block + 108);
}
inline void put_together_q3_k(const BlockParts& parts, std::uint8_t* block) {
  std::memset(block, 0, 32);
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 32; ++i) {
      block[i] = static_cast<std::uint8_t>(block[i] | (parts.codes[32 * part + i] >> 2 & 1) << part);
    }
  }
  gather_bits<2, 32>(parts.codes, block + 32);
  gather_bits<2, 32>(parts.codes + 128, block + 64);
  std::uint8_t* const scales = block + 96;
  std::memset(scales, 0, 12);
  for (int i = 0; i < 16; ++i) {
    const int scale = (parts.scale[i] + 32) & 63;
    scales[i % 8] = static_cast<std::uint8_t>(scales[i % 8] | (scale & 15) << i / 8 * 4);
    scales[8 + i % 4] = static_cast<std::uint8_t>(scales[8 + i % 4] | scale >> 4 << i / 4 * 2);
  }
  write_half(block + 108, parts.halves[0]);
}

// Q4_K, Q5_K: d, m, 12 bytes with 8 scales and 8 minima of 6 bits, 32 bytes of fifth bits, 128 bytes of codes.
inline void take_apart_six_bits(const std::uint8_t* bytes, BlockParts& parts) {
  for (int i = 0; i < 4; ++i) {
    parts.scale[i] = bytes[i] & 63;
    parts.minimum[i] = bytes[i + 4] & 63;
    parts.scale[i + 4] = static_cast<std::uint8_t>((bytes[i + 8] & 15) | bytes[i] >> 6 << 4);
    parts.minimum[i + 4] = static_cast<std::uint8_t>(bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4);
  }
}
inline void put_together_six_bits(const BlockParts& parts, std::uint8_t* bytes) {
  for (int i = 0; i < 4; ++i) {
    bytes[i] = static_cast<std::uint8_t>(parts.scale[i] | parts.scale[i + 4] >> 4 << 6);
    bytes[i + 4] = static_cast<std::uint8_t>(parts.minimum[i] | parts.minimum[i + 4] >> 4 << 6);
    bytes[i + 8] = static_cast<std::uint8_t>((parts.scale[i + 4] & 15) | (parts.minimum[i + 4] & 15) << 4);
  }
}

inline void take_apart_q4_k(const std::uint8_t* block, BlockParts& parts) {
  for (int i = 0; i < 2; ++i) parts.halves[i] = read_half(block + 2 * i);
  take_apart_six_bits(block + 4, parts);
  for (int pair = 0; pair < 4; ++pair) spread_bits<4, 32>(block + 16 + 32 * pair, parts.codes + 64 * pair);
}
inline void put_together_q4_k(const BlockParts& parts, std::uint8_t* block) {
  for (int i = 0; i < 2; ++i) write_half(block + 2 * i, parts.halves[i]);
  put_together_six_bits(parts, block + 4);
  for (int pair = 0; pair < 4; ++pair) gather_bits<4, 32>(parts.codes + 64 * pair, block + 16 + 32 * pair);
}

inline void take_apart_q5_k(const std::uint8_t* block, BlockParts& parts) {
  for (int i = 0; i < 2; ++i) parts.halves[i] = read_half(block + 2 * i);
  take_apart_six_bits(block + 4, parts);
  for (int pair = 0; pair < 4; ++pair) spread_bits<4, 32>(block + 48 + 32 * pair, parts.codes + 64 * pair);
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 32; ++i) {
      std::uint8_t& code = parts.codes[32 * part + i];
      code = static_cast<std::uint8_t>(code | (block[16 + i] >> part & 1) << 4);
    }
  }
}
inline void put_together_q5_k(const BlockParts& parts, std::uint8_t* block) {
  for (int i = 0; i < 2; ++i) write_half(block + 2 * i, parts.halves[i]);
  put_together_six_bits(parts, block + 4);
  std::memset(block + 16, 0, 32);
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 32; ++i) {
      block[16 + i] = static_cast<std::uint8_t>(block[16 + i] | (parts.codes[32 * part + i] >> 4 & 1) << part);
    }
  }
  for (int pair = 0; pair < 4; ++pair) gather_bits<4, 32>(parts.codes + 64 * pair, block + 48 + 32 * pair);
}

// Q6_K: 128 bytes of low and 64 of high bits, 16 signed scales, d.
inline void take_apart_q6_k(const std::uint8_t* block, BlockParts& parts) {
  for (int half = 0; half < 2; ++half) {
    std::uint8_t high[128];
    spread_bits<4, 64>(block + 64 * half, parts.codes + 128 * half);
    spread_bits<2, 32>(block + 128 + 32 * half, high);
    for (int i = 0; i < 128; ++i) {
      std::uint8_t& code = parts.codes[128 * half + i];
      code = static_cast<std::uint8_t>(code | high[i] << 4);
    }
  }
  std::memcpy(parts.scale, block + 192, 16);
  parts.halves[0] = read_half(block + 208);
}
inline void put_together_q6_k(const BlockParts& parts, std::uint8_t* block) {
  for (int half = 0; half < 2; ++half) {
    std::uint8_t high[128];
    for (int i = 0; i < 128; ++i) high[i] = parts.codes[128 * half + i] >> 4;
    gather_bits<4, 64>(parts.codes + 128 * half, block + 64 * half);
    gather_bits<2, 32>(high, block + 128 + 32 * half);
  }
  std::memcpy(block + 192, parts.scale, 16);
  write_half(block + 208, parts.halves[0]);
}

// IQ4_XS: d, 8 scales of 6 bits plus 32 (16 bits of their high parts, then 4 bytes of low parts), 128 bytes of codes.
inline void take_apart_iq4_xs(const std::uint8_t* block, BlockParts& parts) {
  parts.halves[0] = read_half(block);
  const int high = read_half(block + 2);
  for (int i = 0; i < 8; ++i) {
    const int low = block[4 + i / 2] >> i % 2 * 4 & 15;
    parts.scale[i] = static_cast<std::uint8_t>((low | (high >> 2 * i & 3) << 4) - 32);
    spread_bits<4, 16>(block + 8 + 16 * i, parts.codes + 32 * i);
  }
}
inline void put_together_iq4_xs(const BlockParts& parts, std::uint8_t* block) {
  write_half(block, parts.halves[0]);
  int high = 0;
  std::memset(block + 4, 0, 4);
  for (int i = 0; i < 8; ++i) {
    const int scale = (parts.scale[i] + 32) & 63;
    block[4 + i / 2] = static_cast<std::uint8_t>(block[4 + i / 2] | (scale & 15) << i % 2 * 4);
    high |= scale >> 4 << 2 * i;
    gather_bits<4, 16>(parts.codes + 32 * i, block + 8 + 16 * i);
  }
  write_half(block + 2, static_cast<std::uint16_t>(high));
}

}  // namespace octavo
