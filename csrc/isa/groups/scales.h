// SPDX-License-Identifier: Apache-2.0
// The scales and minima of one group and 16 columns as float32, from whatever they are in memory.
#pragma once

#include <type_traits>

#include "contract/group_kernel.h"
#include "isa/float/vector/vector.h"
#include "isa/integer/bytes.h"

namespace octavo {
namespace {

// 16 bytes as float32 numbers whose bits are f(byte), or as float16 ones.
template <FloatType kType, class F>
inline Vector load_bits(const std::uint8_t* bytes, const F& f) {
  std::conditional_t<kType == FloatType::f32, std::uint32_t, std::uint16_t> bits[kStripColumns];
  for (int i = 0; i < kStripColumns; ++i)
    bits[i] = static_cast<std::remove_reference_t<decltype(bits[0])>>(f(bytes[i]));
  return load<kType>(bits, 0);
}

// The 16 numbers of one byte each from `bytes` on.
inline Vector load_bytes(const std::uint8_t* bytes, Number type) {
  if (type == Number::e8m0) {
    return load_bits<FloatType::f32>(bytes, [](std::uint32_t byte) { return byte ? byte << 23 : 0x00400000u; });
  }
  if (type == Number::e4m3) {
    const auto half = [](std::uint32_t byte) { return byte == 0x7f ? 0u : (byte & 127) << 7; };
    return load_bits<FloatType::f16>(bytes, half) * set(256.0f);
  }
  if (type != Number::low4 && type != Number::high4) return load_steps(bytes, kStripColumns, type == Number::s8, 0);
  std::uint8_t halves[kStripColumns];
  const int shift = type == Number::high4 ? 4 : 0;
  for (int i = 0; i < kStripColumns; ++i) halves[i] = bytes[i] >> shift & 15;
  return load_steps(halves, kStripColumns, false, 0);
}

// The 16 numbers from data[i] on.
inline Vector load_numbers(const void* data, Number type, std::int64_t i) {
  switch (type) {
    case Number::none: return set(1.0f);
    case Number::f32: return load<FloatType::f32>(data, i);
    case Number::bf16: return load<FloatType::bf16>(data, i);
    case Number::f16: return load<FloatType::f16>(data, i);
    default: return load_bytes(static_cast<const std::uint8_t*>(data) + i, type);
  }
}

inline std::int64_t number_at(const GroupScales& scales, int strip, std::int64_t group) {
  return (strip * scales.groups + group) * kStripColumns;
}

inline std::int64_t super_at(const GroupScales& scales, int strip, std::int64_t group) {
  return (strip * scales.supers + group / scales.groups_in_super) * scales.super_rows() * kStripColumns;
}

inline Vector load_scale(const GroupScales& scales, int strip, std::int64_t group) {
  const Vector scale = load_numbers(scales.scale, scales.scale_type, number_at(scales, strip, group));
  if (!scales.super) return scale;
  return load_numbers(scales.super, scales.super_type, super_at(scales, strip, group)) * scale;
}

// `scale` is what load_scale has returned for this group.
inline Vector load_minimum(const GroupScales& scales, int strip, std::int64_t group, const Vector& scale) {
  const Vector minimum = load_numbers(scales.minimum, scales.minimum_type, number_at(scales, strip, group));
  if (scales.super) {
    const std::int64_t at = super_at(scales, strip, group) + kStripColumns;
    return set(-0.0f) - load_numbers(scales.super, scales.super_type, at) * minimum;
  }
  return scales.minimum_type == Number::u8 ? set(-0.0f) - scale * minimum : minimum;
}

// The scales and, if there are any, the minima of some strips in up to kKeptSegments segments, as floats.
constexpr int kKeptSegments = 16;

template <int kStrips>
struct KeptScales {
  Vector scale[kKeptSegments][kStrips], minimum[kKeptSegments][kStrips];
};

// The usual case: floats, one for each segment. They lie one after the other.
template <FloatType kType>
void load_float_scales(const GroupScales& scales, int strip, int strips, std::int64_t first, std::int64_t count,
                       Vector* scale) {
  for (int s = 0; s < strips; ++s) {
    const std::int64_t at = number_at(scales, strip + s, first);
    for (std::int64_t i = 0; i < count; ++i) scale[i * strips + s] = load<kType>(scales.scale, at + i * kStripColumns);
  }
}

void load_any_scales(const GroupProduct& p, int strip, int strips, std::int64_t first, std::int64_t count,
                     Vector* scale, Vector* minimum) {
  const bool has_minimum = p.scales.minimum_type != Number::none;
  for (int s = 0; s < strips; ++s) {
    std::int64_t group = first / p.group_segments, left = p.group_segments - first % p.group_segments;
    for (std::int64_t i = 0; i < count; ++i) {
      Vector& own = scale[i * strips + s];
      own = load_scale(p.scales, strip + s, group);
      if (has_minimum) minimum[i * strips + s] = load_minimum(p.scales, strip + s, group, own);
      if (--left == 0) {
        ++group;
        left = p.group_segments;
      }
    }
  }
}

// Fills these with the segments from `first` on, [segment][strip]. A function of its own, so that its many cases stand in the
// program once, and called rarely, because a call empties all registers.
[[gnu::noinline]] void load_scales(const GroupProduct& p, int strip, int strips, std::int64_t first,
                                   std::int64_t segments, Vector* scale, Vector* minimum) {
  const std::int64_t count = segments - first < kKeptSegments ? segments - first : kKeptSegments;
  const bool is_plain = !p.scales.super && p.scales.minimum_type == Number::none && p.group_segments == 1;
  if (is_plain && p.scales.scale_type == Number::f16) {
    return load_float_scales<FloatType::f16>(p.scales, strip, strips, first, count, scale);
  }
  if (is_plain && p.scales.scale_type == Number::f32) {
    return load_float_scales<FloatType::f32>(p.scales, strip, strips, first, count, scale);
  }
  load_any_scales(p, strip, strips, first, count, scale, minimum);
}

}  // namespace
}  // namespace octavo
