// SPDX-License-Identifier: Apache-2.0
// The executable definition of what codes_avx2.h and codes_avx512_vnni.h do. A word holds two codes as int16.
#pragma once

#include "isa/float/tile/tile.h"

namespace octavo {
namespace {

struct CodeWords {
  static constexpr int kPerWord = 2;

  struct MultiplyKeys {
    static void add(Vector& acc, const Vector& a, const Vector& b) {
      acc = each([&](int i) {
        const std::uint32_t x = bits_of(a.lanes[i]), y = bits_of(b.lanes[i]);
        const std::int32_t sum = low(x) * low(y) + low(x >> 16) * low(y >> 16);
        return float_of(bits_of(acc.lanes[i]) + static_cast<std::uint32_t>(sum));
      });
    }
  };
  using MultiplyWeights = MultiplyKeys;

  // The words of a key whose numbers are all 0.
  static Vector key_offset() { return set(0.0f); }
  static Vector as_keys(const Vector& words) { return words; }

  // 16 words of 32 successive numbers, which are rounded half to even.
  static Vector signed_words(const Vector (&parts)[2]) {
    return each([&](int i) { return word(parts[i / 8].lanes[2 * i % 16], parts[i / 8].lanes[2 * i % 16 + 1]); });
  }
  static Vector unsigned_words(const Vector (&parts)[2]) { return signed_words(parts); }

  // 16 words. Word i holds number i of each row.
  static Vector stack(const Vector (&rows)[2]) {
    return each([&](int i) { return word(rows[0].lanes[i], rows[1].lanes[i]); });
  }

  static Vector reals(const Vector& sums) {
    return each([&](int i) { return static_cast<float>(static_cast<std::int32_t>(bits_of(sums.lanes[i]))); });
  }

 private:
  static std::int32_t low(std::uint32_t word) { return static_cast<std::int16_t>(word & 0xffffu); }

  // NaN has no code. It occurs only in rows whose results are NaN whatever their codes are.
  static std::uint32_t code(float value) {
    return std::isfinite(value) ? static_cast<std::uint32_t>(static_cast<std::int32_t>(std::nearbyint(value))) : 0u;
  }
  static float word(float low, float high) { return float_of((code(low) & 0xffffu) | code(high) << 16); }
};

}  // namespace
}  // namespace octavo
