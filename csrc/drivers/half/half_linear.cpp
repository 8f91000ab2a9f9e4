// SPDX-License-Identifier: Apache-2.0
// A thread takes its outputs in blocks: some rows times a panel of strips. It adds up a block's sums over one stretch of k
// after the other, so that the rows of a tile stay in the L1 cache and the weights of a panel in the L2 cache while rows go by.
// The sums wait in float32 between two stretches, which changes no bit.
#include "half_linear.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/scratch.h"
#include "drivers/pack.h"
#include "drivers/tiles.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kBlockRows = 120;  // with kHalfBlockK of their k 250 KB; a multiple of all tiles
constexpr std::int64_t kUnitRows = 12;    // threads share out rows in such units
constexpr std::int64_t kPanelStrips = 8;  // with kHalfBlockK of their k 128 KB of weights
constexpr std::int64_t kPanelColumns = kPanelStrips * kStripColumns;

thread_local Scratch row_scratch, sum_scratch;  // each thread's memory for one block

struct Product {
  const FloatKernel& kernel;
  const Activations& x;
  const HalfWeight& weight;
  const Output& out;
};

// Rows `rows` of x over k = first_k .. first_k + k, as float32 at the distance that kernels need.
void widen_rows(const Product& p, Range rows, std::int64_t first_k, std::int64_t k, float* out) {
  const std::int64_t first = (rows.begin * p.weight.k + first_k) * bytes_of(p.x.type);
  p.kernel.activate({Activation::none, static_cast<const char*>(p.x.data) + first, p.weight.k, p.x.type,
                     rows.end - rows.begin, k, out, kHalfRowDistance, FloatType::f32});
}

// At most kBlockRows rows times at most kPanelStrips strips, from sums to outputs.
void multiply_block(const Product& p, Range rows, Range strips) {
  const std::int64_t count = rows.end - rows.begin, k = p.weight.k, n = p.weight.n;
  const auto scratch = [](Scratch& memory, std::int64_t floats) {
    return reinterpret_cast<float*>(memory.get(floats * static_cast<std::int64_t>(sizeof(float))));
  };
  float* const x = scratch(row_scratch, count * kHalfRowDistance);
  float* const sums = scratch(sum_scratch, count * kPanelColumns);
  std::fill_n(sums, count * kPanelColumns, 0.0f);
  const std::uint16_t* const panel = p.weight.strips + strips.begin * k * kStripColumns;
  for (std::int64_t at = 0; at < k; at += kHalfBlockK) {
    const std::int64_t length = std::min(kHalfBlockK, k - at);
    widen_rows(p, rows, at, length, x);
    p.kernel.multiply_half({x, panel + at * kStripColumns, k * kStripColumns, p.weight.type, length, count,
                            strips.end - strips.begin, sums, kPanelColumns});
  }
  const std::int64_t column = strips.begin * kStripColumns;
  const std::int64_t columns = std::min(strips.end * kStripColumns, n) - column;
  char* const out = static_cast<char*>(p.out.data) + (rows.begin * n + column) * bytes_of(p.out.type);
  p.kernel.activate({p.out.activation, sums, kPanelColumns, FloatType::f32, count, columns, out, n, p.out.type,
                     p.weight.bias ? p.weight.bias + column : nullptr});
}

// All rows of a block of nearly equal blocks, for each of them one panel after the other.
void multiply_part(const Product& p, Range rows, Range strips) {
  const std::int64_t count = rows.end - rows.begin, blocks = ceil_divide(count, kBlockRows);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Range block_rows{rows.begin + block * count / blocks, rows.begin + (block + 1) * count / blocks};
    for (std::int64_t strip = strips.begin; strip < strips.end; strip += kPanelStrips) {
      multiply_block(p, block_rows, {strip, std::min(strip + kPanelStrips, strips.end)});
    }
  }
}

}  // namespace

// Threads share out the rows if there are many, and otherwise the strips.
void linear_half(const Activations& x, const HalfWeight& weight, Output out) {
  if (x.m == 0 || weight.n == 0) return;
  const Product product{active_float_kernel(), x, weight, out};
  const std::int64_t strips = ceil_divide(weight.n, kStripColumns);
  const std::int64_t work = std::max<std::int64_t>(1, x.m * weight.n * weight.k);
  const auto grain = [&](std::int64_t units) { return std::max<std::int64_t>(1, units * kSerialWork / work); };
  if (x.m < kRowsToSplit * thread_count()) {
    return parallel(strips, grain(strips),
                    [&](auto begin, auto end) { multiply_part(product, {0, x.m}, {begin, end}); });
  }
  const std::int64_t units = ceil_divide(x.m, kUnitRows);
  parallel(units, grain(units), [&](auto begin, auto end) {
    multiply_part(product, {begin * kUnitRows, std::min(end * kUnitRows, x.m)}, {0, strips});
  });
}

}  // namespace octavo
