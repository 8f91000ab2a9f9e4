// SPDX-License-Identifier: Apache-2.0
// Activation rows to signed codes with a scale for each group of k, over a Vector.
//
// Three passes: the largest magnitude of each group, the scales, the codes. The scales of 16 groups are found at once, for
// divisions are slow.
#pragma once

#include <cfloat>
#include <cstring>

#include "contract/group_kernel.h"
#include "isa/float/vector/vector.h"
#include "isa/integer/bytes.h"

namespace octavo {
namespace {

// 2 Vectors from x[i] on; lanes at and beyond `count` are 0.
template <FloatType kType>
inline void load_block(const void* x, std::int64_t i, std::int64_t count, Vector& low, Vector& high) {
  if (i + kBlockK <= count) {
    low = load<kType>(x, i);
    high = load<kType>(x, i + 16);
  } else {
    const std::int64_t left = count > i ? count - i : 0;
    low = load<kType>(x, i, left);
    high = load<kType>(x, i + 16, left > 16 ? left - 16 : 0);
  }
}

// The largest magnitude of each group, and of all of them together.
template <FloatType kType>
float absmax_of_groups(const QuantizeGroups& q, float* absmax) {
  Vector all = set(0.0f);
  for (std::int64_t begin = 0, group = 0; begin < q.count; begin += q.group, ++group) {
    Vector largest = set(0.0f);
    for (std::int64_t i = begin; i < begin + q.group && i < q.count; i += kBlockK) {
      Vector low, high;
      load_block<kType>(q.x, i, q.count, low, high);
      largest = max_magnitude(largest, max_magnitude(abs(low), abs(high)));
    }
    all = max_magnitude(all, largest);
    absmax[group] = largest_magnitude(largest);
  }
  return largest_magnitude(all);
}

// The codes of 64 elements from element i on, of which the first 32 have one scale and the others another one, or the same.
template <FloatType kType>
inline void quantize_two_blocks(const QuantizeGroups& q, std::int64_t i, float first_inverse, float second_inverse) {
  Vector numbers[4];
  load_block<kType>(q.x, i, q.count, numbers[0], numbers[1]);
  load_block<kType>(q.x, i + kBlockK, q.count, numbers[2], numbers[3]);
  const Vector low = set(-127.0f), high = set(127.0f);
  OCTAVO_UNROLL for (int v = 0; v < 4; ++v) {
    numbers[v] = bounded(numbers[v] * set(v < 2 ? first_inverse : second_inverse), low, high);
  }
  const Words64 codes(numbers);
  store_part(reinterpret_cast<std::uint8_t*>(q.codes + i), q.count - i, codes.low_bytes());
}

template <FloatType kType>
bool quantize_groups_of(const QuantizeGroups& all) {
  const QuantizeGroups q = all;
  if (!(absmax_of_groups<kType>(q, q.scale) < __builtin_inff())) return false;
  const std::int64_t groups = (q.count + q.group - 1) / q.group;
  for (std::int64_t group = 0; group < groups; ++group) {
    const float scale = q.scale[group] / 127.0f;
    q.scale[group] = scale >= FLT_MIN ? scale : 1.0f;
  }
  for (std::int64_t i = 0; i < q.count; i += 64) {
    const std::int64_t first = i / q.group, second = (i + kBlockK) / q.group;
    const float inverse = 1.0f / q.scale[first];
    const bool is_one = second == first || second >= groups;
    quantize_two_blocks<kType>(q, i, inverse, is_one ? inverse : 1.0f / q.scale[second]);
  }
  return true;
}

bool quantize_groups(const QuantizeGroups& q) {
  return with_type(q.type, [&](auto type) { return quantize_groups_of<decltype(type)::value>(q); });
}

// Over sum_4_units of the instruction set.
void sum_units(const std::int8_t* codes, std::int64_t units, std::int32_t* sums) {
  std::int64_t i = 0;
  for (; i + 4 <= units; i += 4) sum_4_units(codes + i * kUnitK, sums + i);
  if (i == units) return;
  std::int8_t padded[4 * kUnitK] = {};
  std::int32_t last[4];
  std::memcpy(padded, codes + i * kUnitK, static_cast<std::size_t>((units - i) * kUnitK));
  sum_4_units(padded, last);
  for (int j = 0; i + j < units; ++j) sums[i + j] = last[j];
}

}  // namespace
}  // namespace octavo
