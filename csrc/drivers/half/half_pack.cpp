// SPDX-License-Identifier: Apache-2.0
// Packing permutes the values and adds zeros as padding, so unpacking gives back every value. Each strip is written by one
// thread.
#include "half_pack.h"

#include <algorithm>

#include "base/parallel.h"
#include "drivers/pack.h"
#include "isa/common/half.h"

namespace octavo {
namespace {

constexpr std::int64_t kValuesPerTask = 1 << 17;  // about 100 us of packing
constexpr std::int64_t kBlockK = 64;              // of so many k, both sides lie in the L1 cache

// Calls f(strip, first column, columns) for all strips.
template <class F>
void for_each_strip(std::int64_t n, std::int64_t k, const F& f) {
  const std::int64_t grain = kValuesPerTask / kStripColumns / std::max<std::int64_t>(k, 1);
  parallel(ceil_divide(n, kStripColumns), std::max<std::int64_t>(1, grain), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::int64_t first = strip * kStripColumns;
      f(strip, first, std::min<std::int64_t>(kStripColumns, n - first));
    }
  });
}

}  // namespace

void pack_half(const HalfMatrix& weight, std::uint16_t* strips) {
  const std::int64_t k = weight.k;
  for_each_strip(weight.n, k, [&](std::int64_t strip, std::int64_t first, std::int64_t columns) {
    std::uint16_t* const out = strips + strip * k * kStripColumns;
    if (columns < kStripColumns) std::fill_n(out, k * kStripColumns, std::uint16_t{0});
    for (std::int64_t block = 0; block < k; block += kBlockK) {
      const std::int64_t end = std::min(block + kBlockK, k);
      for (std::int64_t j = 0; j < columns; ++j) {
        const std::uint16_t* const row = weight.data + (first + j) * weight.stride_n;
        for (std::int64_t i = block; i < end; ++i) out[i * kStripColumns + j] = row[i * weight.stride_k];
      }
    }
  });
}

void unpack_half(const std::uint16_t* strips, std::int64_t n, std::int64_t k, std::uint16_t* weight) {
  for_each_strip(n, k, [&](std::int64_t strip, std::int64_t first, std::int64_t columns) {
    const std::uint16_t* const from = strips + strip * k * kStripColumns;
    for (std::int64_t block = 0; block < k; block += kBlockK) {
      const std::int64_t end = std::min(block + kBlockK, k);
      for (std::int64_t j = 0; j < columns; ++j) {
        std::uint16_t* const row = weight + (first + j) * k;
        for (std::int64_t i = block; i < end; ++i) row[i] = from[i * kStripColumns + j];
      }
    }
  });
}

void embedding_half(const std::uint16_t* strips, std::int64_t k, FloatType from, const Ids& ids, void* out,
                    FloatType to) {
  const std::int64_t grain = std::max<std::int64_t>(1, kValuesPerTask / std::max<std::int64_t>(k, 1));
  parallel(ids.count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint16_t* const column = strips + ids[i] / kStripColumns * k * kStripColumns + ids[i] % kStripColumns;
      for (std::int64_t j = 0; j < k; ++j) store_float(out, to, i * k + j, load_float(column, from, j * kStripColumns));
    }
  });
}

}  // namespace octavo
