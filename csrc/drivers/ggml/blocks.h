// SPDX-License-Identifier: Apache-2.0
// The blocks of GGML: what the bytes of a block of each type are, taken apart into codes and numbers and put together again.
//
// A block holds codes u and the scales of groups of them. With d and m, two numbers of 16 bits, and s and t, small integers:
//
//   value = scale * (u - offset) + minimum           or scale * values[u]
//   scale = d     minimum = m                        groups as long as a block
//   scale = d * s     minimum = -(m * t)             two levels
//   scale = unit * (s as a float of 8 bits)          MXFP4, NVFP4
//
// Source: ggml 0.25, ggml-common.h and ggml-quants.c. docs/packed_format.md says how the parts lie in packed weights.
#pragma once

#include <cstdint>

#include "contract/group_kernel.h"

namespace octavo {

constexpr int kMostElements = 256, kMostGroups = 16;  // of a block

// A block, taken apart.
struct BlockParts {
  std::uint8_t codes[kMostElements];
  std::uint16_t halves[2];  // d and m, float16
  std::uint8_t scale[kMostGroups], minimum[kMostGroups];
};

// What a block becomes codes of.
struct BlockInput {
  const float* x;
  const float* importance;  // of each element, or null
  float mean_square;        // of the row that the block is a part of; only read if there is importance
};

// A type of blocks.
struct BlockForm {
  int id;            // in files
  const char* name;  // as ggml spells it
  int elements, bytes;
  int group;              // elements that share a scale
  int bits;               // of a packed code
  int offset;             // what is subtracted from u
  Number scale, minimum;  // of groups: f16 for d and m; low4 and high4 share one byte
  bool two_levels;
  const std::int8_t* values;  // of 16 codes, or null
  float unit;                 // what every scale is multiplied by
  void (*take_apart)(const std::uint8_t* block, BlockParts& parts);
  void (*put_together)(const BlockParts& parts, std::uint8_t* block);
  void (*encode)(const BlockInput& input, BlockParts& parts);

  int groups() const { return elements / group; }
  bool has_scale_bytes() const { return scale != Number::f16; }
  bool has_minimum() const { return minimum != Number::none; }
  // float16 numbers of a block in its packed form; in bytes of MXFP4 and NVFP4 there are none.
  int half_count() const { return scale == Number::e8m0 || scale == Number::e4m3 ? 0 : has_minimum() ? 2 : 1; }
};

// The type with this number in files. Throws std::invalid_argument, in the name of the operator `op`.
const BlockForm& block_form(const char* op, std::int64_t id);

}  // namespace octavo
