// SPDX-License-Identifier: Apache-2.0
// Unsigned codes of 1 to 7 bits to packed strips and back. docs/packed_format.md draws the layout.
#pragma once

#include <cstdint>

#include "contract/group_kernel.h"
#include "drivers/pack.h"

namespace octavo {

// Blocks of 32 k, an even number, so that strips begin at whole tiles of 64 k.
constexpr std::int64_t plane_blocks(std::int64_t k) { return 2 * ceil_divide(k, kTileK); }

constexpr std::int64_t strip_bytes_of_planes(std::int64_t k, int bits) { return plane_blocks(k) * bits * kLineBytes; }

// codes [n, k], contiguous; bits that do not fit are cut off. Padding is code 0.
void pack_planes(const std::uint8_t* codes, std::int64_t n, std::int64_t k, int bits, std::uint8_t* planes);

void unpack_planes(const std::uint8_t* planes, std::int64_t n, std::int64_t k, int bits, std::uint8_t* codes);

// Unsigned codes of up to 16 columns and 32 k of each.
struct BlockCodes {
  const std::uint8_t* first;
  std::int64_t stride;  // from one column to the next
  int columns, depth;
};

// One block of a strip: `bits` lines, or, with 8 bits, the 8 lines of S16, whose codes are u - 128. Padding is 0.
void pack_block(const BlockCodes& codes, int bits, std::uint8_t* block);

void unpack_block(const std::uint8_t* block, int bits, int columns, int depth, std::uint8_t* codes,
                  std::int64_t stride);

}  // namespace octavo
