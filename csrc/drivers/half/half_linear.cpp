// SPDX-License-Identifier: Apache-2.0
// A thread takes a block of rows at a time, which it widens to float32 once, and multiplies it by one panel of strips after the
// other. It adds up a panel's sums over one stretch of k after the other, so that the rows of a tile stay in the L1 cache and
// the weights of a panel in the L2 cache while rows go by. The sums wait in float32 between two stretches, which changes no bit.
#include "half_linear.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/scratch.h"
#include "drivers/pack.h"
#include "drivers/tiles.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kUnitRows = 12;         // a multiple of all tiles; threads share out rows in such units
constexpr std::int64_t kBlockRows = 120;       // one stretch of their k is 250 KB
constexpr std::int64_t kBlockBytes = 2 << 20;  // of all their k; less only if it is fewer than kUnitRows
constexpr std::int64_t kPanelStrips = 8;       // one stretch of k is 128 KB of weights
constexpr std::int64_t kPanelColumns = kPanelStrips * kStripColumns;

thread_local Scratch row_scratch, sum_scratch;  // each thread's memory for one block

struct Product {
  const FloatKernel& kernel;
  const Activations& x;
  const HalfWeight& weight;
  const Output& out;
};

float* floats_of(Scratch& scratch, std::int64_t count) {
  return reinterpret_cast<float*>(scratch.get(count * static_cast<std::int64_t>(sizeof(float))));
}

// Calls f(first k, how many) for each stretch of k.
template <class F>
void each_stretch(std::int64_t k, const F& f) {
  for (std::int64_t at = 0; at < k; at += kHalfBlockK) f(at, std::min(kHalfBlockK, k - at));
}

// Where in a block of `count` widened rows the stretch from k = `at` on lies.
std::int64_t stretch_offset(std::int64_t at, std::int64_t count) { return at / kHalfBlockK * count * kHalfRowDistance; }

// The rows of x as float32: all of them over one stretch of k, then over the next, at the distance that kernels need.
const float* widen_rows(const Product& p, Range rows) {
  const std::int64_t count = rows.end - rows.begin, k = p.weight.k;
  float* const out = floats_of(row_scratch, stretch_offset(k + kHalfBlockK - 1, count));
  each_stretch(k, [&](std::int64_t at, std::int64_t length) {
    const void* const x = static_cast<const char*>(p.x.data) + (rows.begin * k + at) * bytes_of(p.x.type);
    p.kernel.activate({Activation::none, x, k, p.x.type, count, length, out + stretch_offset(at, count),
                       kHalfRowDistance, FloatType::f32});
  });
  return out;
}

// Widened rows times at most kPanelStrips strips, from sums to outputs.
void multiply_panel(const Product& p, Range rows, const float* x, Range strips) {
  const std::int64_t count = rows.end - rows.begin, k = p.weight.k, n = p.weight.n;
  float* const sums = floats_of(sum_scratch, count * kPanelColumns);
  std::fill_n(sums, count * kPanelColumns, 0.0f);
  const std::uint16_t* const panel = p.weight.strips + strips.begin * k * kStripColumns;
  each_stretch(k, [&](std::int64_t at, std::int64_t length) {
    p.kernel.multiply_half({x + stretch_offset(at, count), panel + at * kStripColumns, k * kStripColumns, p.weight.type,
                            length, count, strips.end - strips.begin, sums, kPanelColumns});
  });
  const std::int64_t column = strips.begin * kStripColumns;
  const std::int64_t columns = std::min(strips.end * kStripColumns, n) - column;
  char* const out = static_cast<char*>(p.out.data) + (rows.begin * n + column) * bytes_of(p.out.type);
  p.kernel.activate({p.out.activation, sums, kPanelColumns, FloatType::f32, count, columns, out, n, p.out.type,
                     p.weight.bias ? p.weight.bias + column : nullptr});
}

std::int64_t most_rows_in_block(std::int64_t k) {
  const std::int64_t stretches = std::max<std::int64_t>(1, ceil_divide(k, kHalfBlockK));
  const std::int64_t row_bytes = stretches * kHalfRowDistance * static_cast<std::int64_t>(sizeof(float));
  return std::clamp(kBlockBytes / row_bytes, kUnitRows, kBlockRows);
}

// Rows in nearly equal blocks, and each of them times one panel of strips after the other.
void multiply_part(const Product& p, Range rows, Range strips) {
  const std::int64_t count = rows.end - rows.begin, blocks = ceil_divide(count, most_rows_in_block(p.weight.k));
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Range block_rows{rows.begin + block * count / blocks, rows.begin + (block + 1) * count / blocks};
    const float* const x = widen_rows(p, block_rows);
    for (std::int64_t strip = strips.begin; strip < strips.end; strip += kPanelStrips) {
      multiply_panel(p, block_rows, x, {strip, std::min(strip + kPanelStrips, strips.end)});
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
