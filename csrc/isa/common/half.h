// SPDX-License-Identifier: Apache-2.0
// 16-bit floats in plain C++, for kernels that every CPU can run.
#pragma once

#include <cstring>

#include "contract/kernel.h"

namespace octavo {
namespace {  // each file has its own copy, so that no code of another instruction set is linked in

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// IEEE binary16 to binary32. The exponent is shifted into place, and a multiplication corrects its bias. The multiplication
// is exact and normalizes subnormal numbers as well.
inline float float_from_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return float_of(sign | 0x7f800000u | (magnitude & 0x007fffffu));  // Inf, NaN
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

// binary32 to binary16, rounded half to even. A result that is subnormal in binary16 is rounded by adding 0.5 in float32,
// whose last bit is worth as much as that of a subnormal number. Normal results are rounded by a carry of integers.
inline std::uint16_t f16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 65,536 or more
  if (magnitude < 0x38800000u) {                                                    // below 2^-14
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

inline std::uint16_t bf16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load_float(const void* x, FloatType type, std::int64_t i) {
  if (type == FloatType::f32) return static_cast<const float*>(x)[i];
  const std::uint16_t half = static_cast<const std::uint16_t*>(x)[i];
  return type == FloatType::bf16 ? float_of(static_cast<std::uint32_t>(half) << 16) : float_from_f16(half);
}

inline void store_float(void* out, FloatType type, std::int64_t i, float value) {
  if (type == FloatType::f32) {
    static_cast<float*>(out)[i] = value;
  } else {
    static_cast<std::uint16_t*>(out)[i] = type == FloatType::bf16 ? bf16_from_float(value) : f16_from_float(value);
  }
}

}  // namespace
}  // namespace octavo
