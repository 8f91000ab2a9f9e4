// SPDX-License-Identifier: Apache-2.0
// The executable definition of what tile_avx2.h and tile_avx512.h do in registers.
#pragma once

#include "isa/float/vector/vector_scalar.h"

namespace octavo {
namespace {

constexpr int kTileVectors = 1;
constexpr int tile_rows(int) { return 6; }

inline void add_product(Vector& acc, const Vector& a, const Vector& b) { acc = multiply_add(a, b, acc); }

// score + bias, but -Inf where bias is -Inf, whatever the score is.
inline Vector add_bias(const Vector& score, const Vector& bias) {
  const float never = -__builtin_inff();
  return each([&](int i) { return bias.lanes[i] == never ? never : score.lanes[i] + bias.lanes[i]; });
}

// 0 in lanes where the byte of mask[i ...] is not 0, otherwise -Inf. Lanes from `count` on are -Inf.
inline Vector bias_of_bytes(const void* mask, std::int64_t i, std::int64_t count) {
  const auto* const bytes = static_cast<const unsigned char*>(mask) + i;
  return each([&](int lane) { return lane < count && bytes[lane] ? 0.0f : -__builtin_inff(); });
}

// Exchanges lane j of rows[i] and lane i of rows[j].
inline void transpose(Vector (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float lane = rows[i].lanes[j];
      rows[i].lanes[j] = rows[j].lanes[i];
      rows[j].lanes[i] = lane;
    }
  }
}

}  // namespace
}  // namespace octavo
