// SPDX-License-Identifier: Apache-2.0
// A row of the weight is a column of a strip. So a row alone costs the unpacking of sixteen, which vector instructions do in a
// microsecond or two for each thousand of k.
#include "group_values.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/scratch.h"
#include "drivers/pack.h"
#include "isa/common/group_numbers.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kValuesPerTask = 1 << 14;

thread_local Scratch lines_scratch;  // each thread's unpacked strip

// The strip's unsigned codes as lines of S16.
const std::uint8_t* unpacked(const GroupWeight& weight, std::int64_t strip) {
  GroupCodes codes = weight.codes;
  codes.strips += strip * codes.strip_stride;
  const std::int64_t units = 2 * ceil_divide(weight.k, kBlockK);
  std::uint8_t* const lines = lines_scratch.get(units * kUnitK * kStripColumns);
  active_group_kernel().unpack_strip({codes, units, 0, lines});
  return lines;
}

// One row of the weight to out[0] .. out[k - 1], from the unpacked lines of its strip. In double, so that only the result is
// rounded.
void dequantize_row(const GroupWeight& weight, const std::uint8_t* lines, std::int64_t row, void* out, FloatType type) {
  const int strip = static_cast<int>(row / kStripColumns), j = static_cast<int>(row % kStripColumns);
  const float column_scale = weight.column_scale ? weight.column_scale[row] : 1.0f;
  const std::int64_t group = weight.group_size ? weight.group_size : std::max<std::int64_t>(weight.k, 1);
  for (std::int64_t begin = 0; begin < weight.k; begin += group) {
    const ScaleAndMinimum numbers = scale_of(weight.scales, strip, begin / group, j);
    for (std::int64_t k = begin; k < std::min(weight.k, begin + group); ++k) {
      const int u = lines[k / kLineK * kLineBytes + j * kLineK + k % kLineK];
      const auto value = static_cast<float>(double{numbers.scale} * (u - weight.offset) + double{numbers.minimum});
      store_float(out, type, k, value * column_scale);
    }
  }
}

// Calls f(begin, end) on several threads if there is enough to do; each of the `count` pieces has so many values.
template <class F>
void share_out(std::int64_t count, std::int64_t values, const F& f) {
  parallel(count, std::max<std::int64_t>(1, kValuesPerTask / std::max<std::int64_t>(values, 1)), f);
}

}  // namespace

void dequantize_groups(const GroupWeight& weight, void* out, FloatType type) {
  const std::int64_t row_bytes = weight.k * bytes_of(type);
  share_out(ceil_divide(weight.n, kStripColumns), weight.k, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::uint8_t* const lines = unpacked(weight, strip);
      const std::int64_t first = strip * kStripColumns, last = std::min(weight.n, first + kStripColumns);
      for (std::int64_t row = first; row < last; ++row) {
        dequantize_row(weight, lines, row, static_cast<char*>(out) + row * row_bytes, type);
      }
    }
  });
}

void embedding_groups(const GroupWeight& weight, const Ids& ids, void* out, FloatType type) {
  const std::int64_t row_bytes = weight.k * bytes_of(type);
  share_out(ids.count, weight.k, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint8_t* const lines = unpacked(weight, ids[i] / kStripColumns);
      dequantize_row(weight, lines, ids[i], static_cast<char*>(out) + i * row_bytes, type);
    }
  });
}

}  // namespace octavo
