// SPDX-License-Identifier: Apache-2.0
// Packing is a permutation of the codes plus zero padding, so unpacking gives back every code. Strips are independent,
// and each is written by one thread.
#include "pack.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace octavo {
namespace {

constexpr std::int64_t kCodesPerTask = 1 << 18;  // about 50 us of packing

// Where column `column` of a strip keeps its codes k .. k + 3.
std::ptrdiff_t line_offset(std::int64_t k, int column) { return k / kLineK * kLineBytes + column * kLineK; }

std::int64_t strips_per_task(std::int64_t k) {
  return std::max<std::int64_t>(1, kCodesPerTask / (kStripColumns * std::max<std::int64_t>(k, 1)));
}

}  // namespace

void pack_weight(const std::int8_t* codes, std::int64_t n, std::int64_t k, std::int64_t stride_n, std::int64_t stride_k,
                 std::int8_t* strips, std::int32_t* column_sum) {
  const std::int64_t strip_bytes = ceil_divide(k, kTileK) * kTileBytes;
  parallel(ceil_divide(n, kStripColumns), strips_per_task(k), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      std::int8_t* const out = strips + strip * strip_bytes;
      const int columns = static_cast<int>(std::min<std::int64_t>(kStripColumns, n - strip * kStripColumns));
      const std::int8_t* const first = codes + strip * kStripColumns * stride_n;
      std::uint32_t sums[kStripColumns] = {};
      std::fill_n(out, strip_bytes, std::int8_t{0});
      for (std::int64_t at = 0; at < k; at += kLineK) {
        const int depth = static_cast<int>(std::min<std::int64_t>(kLineK, k - at));
        for (int column = 0; column < columns; ++column) {
          const std::int8_t* const source = first + column * stride_n + at * stride_k;
          std::int8_t* const line = out + line_offset(at, column);
          for (int i = 0; i < depth; ++i) {
            line[i] = source[i * stride_k];
            sums[column] += static_cast<std::uint32_t>(line[i]);
          }
        }
      }
      for (int column = 0; column < columns; ++column) {
        column_sum[strip * kStripColumns + column] = static_cast<std::int32_t>(sums[column]);
      }
    }
  });
}

void unpack_weight(const std::int8_t* strips, std::int64_t n, std::int64_t k, std::int8_t* codes) {
  const std::int64_t strip_bytes = ceil_divide(k, kTileK) * kTileBytes;
  parallel(n, strips_per_task(k) * kStripColumns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int8_t* const strip = strips + row / kStripColumns * strip_bytes;
      for (std::int64_t at = 0; at < k; at += kLineK) {
        const std::size_t depth = static_cast<std::size_t>(std::min<std::int64_t>(kLineK, k - at));
        std::memcpy(codes + row * k + at, strip + line_offset(at, static_cast<int>(row % kStripColumns)), depth);
      }
    }
  });
}

}  // namespace octavo
