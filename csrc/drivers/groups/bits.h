// SPDX-License-Identifier: Apache-2.0
// Bits of many bytes at once, eight bytes in a word: loops that the compiler turns into vector instructions, which the same on
// single bytes would not be, because the baseline has no shifts of bytes.
#pragma once

#include <cstdint>
#include <cstring>

namespace octavo {

// to[i] |= (from[i] >> right & mask) << left for `count` bytes. The bits of a byte stay in it: right + bits(mask) and
// left + bits(mask) are at most 8.
inline void add_bits(std::uint8_t* to, const std::uint8_t* from, int count, int right, int mask, int left) {
  const std::uint64_t every = 0x0101010101010101u * static_cast<std::uint64_t>(mask);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    std::uint64_t source, sum;
    std::memcpy(&source, from + i, 8);
    std::memcpy(&sum, to + i, 8);
    sum |= (source >> right & every) << left;
    std::memcpy(to + i, &sum, 8);
  }
  for (; i < count; ++i) to[i] = static_cast<std::uint8_t>(to[i] | (from[i] >> right & mask) << left);
}

}  // namespace octavo
