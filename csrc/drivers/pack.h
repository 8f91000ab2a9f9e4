// SPDX-License-Identifier: Apache-2.0
// Weight codes to packed strips and back (contract/layout.h draws the layout), and the column sums that the epilogue needs.
#pragma once

#include <cstdint>

#include "contract/kernel.h"

namespace octavo {

// a is not negative; a + b - 1 could overflow.
constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

constexpr std::int64_t packed_bytes(std::int64_t n, std::int64_t k) {
  return ceil_divide(n, kStripColumns) * ceil_divide(k, kTileK) * kTileBytes;
}

// Packs codes [n, k] into packed_bytes(n, k) bytes at `strips`, with zeros as padding, and writes column_sum[j], the sum over
// k of codes[j][k], which wraps around in int32. `stride_n` and `stride_k` count elements, so that matrices [n, k] and [k, n]
// can both be packed.
void pack_weight(const std::int8_t* codes, std::int64_t n, std::int64_t k, std::int64_t stride_n, std::int64_t stride_k,
                 std::int8_t* strips, std::int32_t* column_sum);

void unpack_weight(const std::int8_t* strips, std::int64_t n, std::int64_t k, std::int8_t* codes);

}  // namespace octavo
