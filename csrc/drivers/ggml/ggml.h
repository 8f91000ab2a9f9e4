// SPDX-License-Identifier: Apache-2.0
// Matrices whose rows are blocks of GGML: from floats, to floats, to packed weights in groups and back.
#pragma once

#include "blocks.h"

namespace octavo {

// A matrix [n, k] of blocks: n rows of row_bytes() bytes, one right behind the other. k is a whole number of blocks.
struct BlockMatrix {
  const BlockForm& form;
  std::int64_t n, k;

  std::int64_t row_blocks() const { return k / form.elements; }
  std::int64_t row_bytes() const { return row_blocks() * form.bytes; }
  std::int64_t groups() const { return k / form.group; }
};

// Floats x [n, k] to blocks. `importance` [k] or null. Throws std::invalid_argument for NaN and Inf in x, and for a scale
// that float16 does not have.
void encode_blocks(const BlockMatrix& shape, const void* x, FloatType type, const float* importance,
                   std::uint8_t* blocks);

void decode_blocks(const BlockMatrix& shape, const std::uint8_t* blocks, void* out, FloatType type);

// What linear_groups reads; docs/packed_format.md draws it. Padding is 0.
struct PackedBlocks {
  std::uint8_t* codes;   // planes, or S16 if the type has 8 bits
  void* scale;           // [strip][group][16]: bytes, or float16
  std::uint16_t* super;  // [strip][block][1 or 2][16] float16; null with one level
  void* minimum;         // as scale; null: there is none, or it shares the bytes of the scale
};

void pack_blocks(const BlockMatrix& shape, const std::uint8_t* blocks, const PackedBlocks& packed);

void unpack_blocks(const BlockMatrix& shape, const PackedBlocks& packed, std::uint8_t* blocks);

}  // namespace octavo
