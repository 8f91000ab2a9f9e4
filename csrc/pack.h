// SPDX-License-Identifier: Apache-2.0
// Weight codes <-> packed strips (the layout is drawn in kernel.h), and the column sums the epilogue needs.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace octavo {

// a is not negative; a + b - 1 could overflow.
constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

constexpr std::int64_t packed_bytes(std::int64_t n, std::int64_t k) {
  return ceil_divide(n, kStripColumns) * ceil_divide(k, kTileK) * kTileBytes;
}

// codes [n, k] -> strips (packed_bytes(n, k), padding zeroed) and column_sum[j] = sum over k of codes[j][k], wrapping.
// `stride_n` and `stride_k` are in elements, so that both [n, k] and [k, n] matrices can be packed.
void pack_weight(const std::int8_t* codes, std::int64_t n, std::int64_t k, std::int64_t stride_n, std::int64_t stride_k,
                 std::int8_t* strips, std::int32_t* column_sum);

void unpack_weight(const std::int8_t* strips, std::int64_t n, std::int64_t k, std::int8_t* codes);

}  // namespace octavo
