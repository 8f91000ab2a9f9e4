// SPDX-License-Identifier: Apache-2.0
// Weights of 16-bit floats to packed strips and back: the layout H16, which contract/layout.h draws.
#pragma once

#include <cstdint>

#include "contract/kernel.h"
#include "contract/layout.h"
#include "drivers/ids.h"

namespace octavo {

// A matrix [n, k] of 16-bit values in any layout. Strides count values.
struct HalfMatrix {
  const std::uint16_t* data;
  std::int64_t n, k, stride_n, stride_k;
};

// Writes ceil(n / 16) * k * 16 values, with zeros as padding.
void pack_half(const HalfMatrix& weight, std::uint16_t* strips);

// Writes a contiguous matrix [n, k].
void unpack_half(const std::uint16_t* strips, std::int64_t n, std::int64_t k, std::uint16_t* weight);

// The rows `ids`, [count, k] in the type `to`, of a weight whose values are of the type `from`.
void embedding_half(const std::uint16_t* strips, std::int64_t k, FloatType from, const Ids& ids, void* out,
                    FloatType to);

}  // namespace octavo
