// SPDX-License-Identifier: Apache-2.0
// The scale and the minimum of one column and one group, in plain C++.
#pragma once

#include <algorithm>

#include "contract/group_kernel.h"
#include "half.h"

namespace octavo {
namespace {  // each file has its own copy, so that no code of another instruction set is linked in

inline float float_from_e8m0(std::uint8_t byte) {
  return float_of(byte ? static_cast<std::uint32_t>(byte) << 23 : 0x00400000u);
}

// As a float16 the byte is 2^-8 of what it means.
inline float float_from_e4m3(std::uint8_t byte) {
  return byte == 0x7f ? 0.0f : 256.0f * float_from_f16(static_cast<std::uint16_t>((byte & 127) << 7));
}

inline float number(const void* data, Number type, std::int64_t i) {
  const auto* const bytes = static_cast<const std::uint8_t*>(data);
  switch (type) {
    case Number::none: return 1.0f;
    case Number::f32: return load_float(data, FloatType::f32, i);
    case Number::bf16: return load_float(data, FloatType::bf16, i);
    case Number::f16: return load_float(data, FloatType::f16, i);
    case Number::u8: return bytes[i];
    case Number::s8: return static_cast<const std::int8_t*>(data)[i];
    case Number::low4: return static_cast<float>(bytes[i] & 15);
    case Number::high4: return static_cast<float>(bytes[i] >> 4);
    case Number::e8m0: return float_from_e8m0(bytes[i]);
    case Number::e4m3: return float_from_e4m3(bytes[i]);
  }
  return 0.0f;
}

struct ScaleAndMinimum {
  float scale, minimum;
};

inline ScaleAndMinimum scale_of(const GroupScales& scales, int strip, std::int64_t group, int column) {
  const std::int64_t at = (strip * scales.groups + group) * kStripColumns + column;
  const std::int64_t super = (strip * scales.supers + group / std::max<std::int64_t>(1, scales.groups_in_super)) *
                                 scales.super_rows() * kStripColumns +
                             column;
  float scale = number(scales.scale, scales.scale_type, at);
  if (scales.super) scale = number(scales.super, scales.super_type, super) * scale;
  if (scales.minimum_type == Number::none) return {scale, 0.0f};
  const float minimum = number(scales.minimum, scales.minimum_type, at);
  if (scales.super) return {scale, -(number(scales.super, scales.super_type, super + kStripColumns) * minimum)};
  return {scale, scales.minimum_type == Number::u8 ? -(scale * minimum) : minimum};
}

}  // namespace
}  // namespace octavo
