// SPDX-License-Identifier: Apache-2.0
// Blocks to strips of planes and scales, and back: strips in parallel. The bits of every block are kept.
#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "drivers/groups/planes.h"
#include "drivers/pack.h"
#include "ggml.h"

namespace octavo {
namespace {

constexpr std::int64_t kElementsOfTask = 1 << 16;

// Where things of one strip begin, and how far apart they are.
struct PackedStrip {
  const BlockMatrix& shape;
  PackedBlocks packed;
  std::int64_t strip;
  int columns;

  int bits() const { return shape.form.bits; }
  std::int64_t block_bytes() const { return std::int64_t{bits()} * kLineBytes; }
  std::int64_t strip_bytes() const { return strip_bytes_of_planes(shape.k, bits()); }
  std::uint8_t* codes() const { return packed.codes + strip * strip_bytes(); }
  int super_rows() const { return shape.form.has_minimum() ? 2 : 1; }

  // The place of a group's number for one column.
  std::int64_t at(std::int64_t group, int column) const {
    return (strip * shape.groups() + group) * kStripColumns + column;
  }
  std::int64_t super_at(std::int64_t block, int row, int column) const {
    return ((strip * shape.row_blocks() + block) * super_rows() + row) * kStripColumns + column;
  }
};

// Calls visit(byte or half of a block, where it is packed) for all numbers of a block of one column.
template <class Visit>
void each_number(const PackedStrip& s, std::int64_t block, int column, BlockParts& parts, const Visit& visit) {
  const BlockForm& form = s.shape.form;
  if (!form.has_scale_bytes()) {
    auto* const scale = static_cast<std::uint16_t*>(s.packed.scale);
    auto* const minimum = static_cast<std::uint16_t*>(s.packed.minimum);
    visit(parts.halves[0], scale[s.at(block, column)]);
    if (minimum) visit(parts.halves[1], minimum[s.at(block, column)]);
    return;
  }
  auto* const scale = static_cast<std::uint8_t*>(s.packed.scale);
  auto* const minimum = static_cast<std::uint8_t*>(s.packed.minimum);
  for (int g = 0; g < form.groups(); ++g) {
    const std::int64_t at = s.at(block * form.groups() + g, column);
    visit(parts.scale[g], scale[at]);
    if (minimum) visit(parts.minimum[g], minimum[at]);
  }
  if (!s.packed.super) return;
  for (int row = 0; row < s.super_rows(); ++row)
    visit(parts.halves[row], s.packed.super[s.super_at(block, row, column)]);
}

// Codes of a block of all columns: [16][kMostElements], of which `elements` are in use.
using Columns = std::uint8_t[kStripColumns][kMostElements];

void pack_strip(const PackedStrip& s, const std::uint8_t* blocks) {
  const BlockForm& form = s.shape.form;
  Columns codes{};
  BlockParts parts{};
  for (std::int64_t block = 0; block < s.shape.row_blocks(); ++block) {
    for (int j = 0; j < s.columns; ++j) {
      form.take_apart(blocks + j * s.shape.row_bytes() + block * form.bytes, parts);
      std::memcpy(codes[j], parts.codes, static_cast<std::size_t>(form.elements));
      each_number(s, block, j, parts, [](const auto& from, auto& to) { to = from; });
    }
    for (int k = 0; k < form.elements; k += kBlockK) {
      const std::int64_t at = (block * form.elements + k) / kBlockK;
      pack_block({&codes[0][k], kMostElements, s.columns, kBlockK}, s.bits(), s.codes() + at * s.block_bytes());
    }
  }
  const std::int64_t used = s.shape.k / kBlockK * s.block_bytes();
  std::memset(s.codes() + used, 0, static_cast<std::size_t>(s.strip_bytes() - used));
}

void unpack_strip(const PackedStrip& s, std::uint8_t* blocks) {
  const BlockForm& form = s.shape.form;
  Columns codes{};
  BlockParts parts{};
  for (std::int64_t block = 0; block < s.shape.row_blocks(); ++block) {
    for (int k = 0; k < form.elements; k += kBlockK) {
      const std::int64_t at = (block * form.elements + k) / kBlockK;
      unpack_block(s.codes() + at * s.block_bytes(), s.bits(), s.columns, kBlockK, &codes[0][k], kMostElements);
    }
    for (int j = 0; j < s.columns; ++j) {
      std::memcpy(parts.codes, codes[j], static_cast<std::size_t>(form.elements));
      each_number(s, block, j, parts, [](auto& to, const auto& from) { to = from; });
      form.put_together(parts, blocks + j * s.shape.row_bytes() + block * form.bytes);
    }
  }
}

template <class F>
void each_strip(const BlockMatrix& shape, const PackedBlocks& packed, const F& f) {
  const std::int64_t grain =
      std::max<std::int64_t>(1, kElementsOfTask / kStripColumns / std::max<std::int64_t>(shape.k, 1));
  parallel(ceil_divide(shape.n, kStripColumns), grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::int64_t first = strip * kStripColumns;
      f(PackedStrip{shape, packed, strip, static_cast<int>(std::min<std::int64_t>(kStripColumns, shape.n - first))},
        first * shape.row_bytes());
    }
  });
}

}  // namespace

void pack_blocks(const BlockMatrix& shape, const std::uint8_t* blocks, const PackedBlocks& packed) {
  each_strip(shape, packed, [&](const PackedStrip& strip, std::int64_t first) { pack_strip(strip, blocks + first); });
}

void unpack_blocks(const BlockMatrix& shape, const PackedBlocks& packed, std::uint8_t* blocks) {
  each_strip(shape, packed, [&](const PackedStrip& strip, std::int64_t first) { unpack_strip(strip, blocks + first); });
}

}  // namespace octavo
