// SPDX-License-Identifier: Apache-2.0
// Packing permutes the codes and adds zeros as padding, so unpacking gives back every code. Each strip is written by one
// thread.
#include "pack.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"

namespace octavo {
namespace {

constexpr std::int64_t kCodesPerTask = 1 << 18;  // about 50 us of packing

// Where in a strip the codes k .. k + 3 of a column lie.
std::ptrdiff_t line_offset(std::int64_t k, int column) { return k / kLineK * kLineBytes + column * kLineK; }

std::int64_t strips_per_task(std::int64_t k) {
  return std::max<std::int64_t>(1, kCodesPerTask / kStripColumns / std::max<std::int64_t>(k, 1));
}

// A matrix of codes in any layout. Strides count elements.
struct CodeMatrix {
  const std::int8_t* data;
  std::int64_t stride_n, stride_k;
};

// Packs columns x depth codes into one tile and adds them to the sums of their columns. Codes are read in the order in which
// they lie in memory: a weight [n, k] column by column, the right side [k, n] of a product one k after the other.
void pack_tile(const CodeMatrix& codes, int columns, int depth, std::int8_t* tile, std::uint32_t* sums) {
  if (codes.stride_k == 1) {
    for (int j = 0; j < columns; ++j) {
      const std::int8_t* const column = codes.data + j * codes.stride_n;
      std::int8_t* const out = tile + line_offset(0, j);
      int k = 0;
      for (; k + kLineK <= depth; k += kLineK) std::memcpy(out + line_offset(k, 0), column + k, kLineK);
      for (; k < depth; ++k) out[line_offset(k, 0) + k % kLineK] = column[k];
      for (k = 0; k < depth; ++k) sums[j] += static_cast<std::uint32_t>(column[k]);
    }
    return;
  }
  for (int k = 0; k < depth; ++k) {
    const std::int8_t* const row = codes.data + k * codes.stride_k;
    std::int8_t* const out = tile + line_offset(k, 0) + k % kLineK;
    for (int j = 0; j < columns; ++j) {
      const std::int8_t code = row[j * codes.stride_n];
      out[j * kLineK] = code;
      sums[j] += static_cast<std::uint32_t>(code);
    }
  }
}

void pack_strip(const CodeMatrix& codes, int columns, std::int64_t k, std::int8_t* strip, std::int32_t* column_sum) {
  std::uint32_t sums[kStripColumns] = {};
  for (std::int64_t at = 0; at < k; at += kTileK) {
    std::int8_t* const tile = strip + at * kStripColumns;
    const int depth = static_cast<int>(std::min<std::int64_t>(kTileK, k - at));
    if (depth < kTileK || columns < kStripColumns) std::fill_n(tile, kTileBytes, std::int8_t{0});
    pack_tile({codes.data + at * codes.stride_k, codes.stride_n, codes.stride_k}, columns, depth, tile, sums);
  }
  for (int j = 0; j < columns; ++j) column_sum[j] = static_cast<std::int32_t>(sums[j]);
}

}  // namespace

void pack_weight(const std::int8_t* codes, std::int64_t n, std::int64_t k, std::int64_t stride_n, std::int64_t stride_k,
                 std::int8_t* strips, std::int32_t* column_sum) {
  const std::int64_t strip_bytes = ceil_divide(k, kTileK) * kTileBytes;
  parallel(ceil_divide(n, kStripColumns), strips_per_task(k), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::int64_t first = strip * kStripColumns;
      const int columns = static_cast<int>(std::min<std::int64_t>(kStripColumns, n - first));
      const CodeMatrix rows{codes + first * stride_n, stride_n, stride_k};
      pack_strip(rows, columns, k, strips + strip * strip_bytes, column_sum + first);
    }
  });
}

void unpack_weight(const std::int8_t* strips, std::int64_t n, std::int64_t k, std::int8_t* codes) {
  const std::int64_t strip_bytes = ceil_divide(k, kTileK) * kTileBytes;
  parallel(ceil_divide(n, kStripColumns), strips_per_task(k), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::int64_t first = strip * kStripColumns;
      const int columns = static_cast<int>(std::min<std::int64_t>(kStripColumns, n - first));
      for (std::int64_t at = 0; at < k; at += kTileK) {  // tile by tile: a line is read 16 times, from the L1 cache
        const std::int8_t* const tile = strips + strip * strip_bytes + at * kStripColumns;
        const int depth = static_cast<int>(std::min<std::int64_t>(kTileK, k - at));
        for (int j = 0; j < columns; ++j) {
          std::int8_t* const row = codes + (first + j) * k + at;
          int i = 0;
          for (; i + kLineK <= depth; i += kLineK) std::memcpy(row + i, tile + line_offset(i, j), kLineK);
          for (; i < depth; ++i) row[i] = tile[line_offset(i, j) + i % kLineK];
        }
      }
    }
  });
}

}  // namespace octavo
