// SPDX-License-Identifier: Apache-2.0
// A block is 8 lines of 64 codes, as they lie in S16; the lines are folded into `bits` lines. The loops over the 64 bytes of a
// line have no branches, so that the compiler turns them into vector instructions.
#include "planes.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kCodesPerTask = 1 << 18;

using Lines = std::uint8_t[kBlockLines][kLineBytes];

// to |= (from >> right & mask) << left
void add_bits(std::uint8_t* to, const std::uint8_t* from, int right, int mask, int left) {
  for (int i = 0; i < kLineBytes; ++i) to[i] = static_cast<std::uint8_t>(to[i] | (from[i] >> right & mask) << left);
}

// 3 bits: isa/groups/codes.h, Thirds.
void fold_thirds(const Lines& lines, std::uint8_t* block) {
  for (int line = 0; line < kBlockLines; ++line) {
    if (line % 3 != 2) {
      add_bits(block + line / 3 * kLineBytes, lines[line], 0, 7, line % 3 * 3);
    } else {
      add_bits(block + line / 3 * kLineBytes, lines[line], 0, 3, 6);
      add_bits(block + 2 * kLineBytes, lines[line], 2, 1, line == 2 ? 6 : 7);
    }
  }
}

// All other widths: planes of 4, 2 and 1 bits, the lowest one first.
void fold_planes(const Lines& lines, int bits, std::uint8_t* block) {
  int first = 0;
  for (const int width : {4, 2, 1}) {
    if (!(bits & width)) continue;
    const int in_byte = 8 / width;
    for (int line = 0; line < kBlockLines; ++line) {
      add_bits(block + (first + line / in_byte) * kLineBytes, lines[line], first, (1 << width) - 1,
               line % in_byte * width);
    }
    first += width;
  }
}

// The codes of up to 16 columns and 32 k as lines of S16.
void gather_block(const std::uint8_t* codes, std::int64_t stride, int columns, int depth, Lines& lines) {
  if (columns < kStripColumns || depth < kBlockK) std::memset(lines, 0, sizeof lines);
  for (int j = 0; j < columns; ++j) {
    const std::uint8_t* const column = codes + j * stride;
    int k = 0;
    for (; k + kLineK <= depth; k += kLineK) std::memcpy(&lines[k / kLineK][j * kLineK], column + k, kLineK);
    for (; k < depth; ++k) lines[k / kLineK][j * kLineK + k % kLineK] = column[k];
  }
}

void scatter_block(const std::uint8_t* lines, std::int64_t stride, int columns, int depth, std::uint8_t* codes) {
  for (int j = 0; j < columns; ++j) {
    std::uint8_t* const column = codes + j * stride;
    int k = 0;
    for (; k + kLineK <= depth; k += kLineK) std::memcpy(column + k, lines + k * kStripColumns + j * kLineK, kLineK);
    for (; k < depth; ++k) column[k] = lines[k / kLineK * kLineBytes + j * kLineK + k % kLineK];
  }
}

// Calls f(strip, columns) for all strips, in parallel.
template <class F>
void for_each_strip(std::int64_t n, std::int64_t k, const F& f) {
  const std::int64_t grain = std::max<std::int64_t>(1, kCodesPerTask / kStripColumns / std::max<std::int64_t>(k, 1));
  parallel(ceil_divide(n, kStripColumns), grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      f(strip, static_cast<int>(std::min<std::int64_t>(kStripColumns, n - strip * kStripColumns)));
    }
  });
}

}  // namespace

void pack_block(const BlockCodes& codes, int bits, std::uint8_t* block) {
  Lines lines;
  gather_block(codes.first, codes.stride, codes.columns, codes.depth, lines);
  if (bits == 8) {
    for (int i = 0; i < kBlockK * kStripColumns; ++i) {
      const bool is_padding = i % kLineBytes / kLineK >= codes.columns;
      block[i] = is_padding ? 0 : lines[i / kLineBytes][i % kLineBytes] ^ 128;
    }
    return;
  }
  std::memset(block, 0, static_cast<std::size_t>(bits * kLineBytes));
  bits == 3 ? fold_thirds(lines, block) : fold_planes(lines, bits, block);
}

void unpack_block(const std::uint8_t* block, int bits, int columns, int depth, std::uint8_t* codes,
                  std::int64_t stride) {
  alignas(kLineBytes) std::uint8_t lines[kBlockK * kStripColumns];
  active_group_kernel().unpack_strip({{block, 0, bits, nullptr, false}, kBlockK / kUnitK, 0, lines});
  scatter_block(lines, stride, columns, depth, codes);
}

void pack_planes(const std::uint8_t* codes, std::int64_t n, std::int64_t k, int bits, std::uint8_t* planes) {
  const std::int64_t strip_bytes = strip_bytes_of_planes(k, bits), block_bytes = std::int64_t{bits} * kLineBytes;
  for_each_strip(n, k, [&](std::int64_t strip, int columns) {
    std::uint8_t* const out = planes + strip * strip_bytes;
    std::memset(out, 0, static_cast<std::size_t>(strip_bytes));
    for (std::int64_t at = 0; at < k; at += kBlockK) {
      const int depth = static_cast<int>(std::min<std::int64_t>(kBlockK, k - at));
      pack_block({codes + strip * kStripColumns * k + at, k, columns, depth}, bits, out + at / kBlockK * block_bytes);
    }
  });
}

void unpack_planes(const std::uint8_t* planes, std::int64_t n, std::int64_t k, int bits, std::uint8_t* codes) {
  const std::int64_t strip_bytes = strip_bytes_of_planes(k, bits), block_bytes = std::int64_t{bits} * kLineBytes;
  for_each_strip(n, k, [&](std::int64_t strip, int columns) {
    for (std::int64_t at = 0; at < k; at += kBlockK) {
      const int depth = static_cast<int>(std::min<std::int64_t>(kBlockK, k - at));
      unpack_block(planes + strip * strip_bytes + at / kBlockK * block_bytes, bits, columns, depth,
                   codes + strip * kStripColumns * k + at, k);
    }
  });
}

}  // namespace octavo
