// SPDX-License-Identifier: Apache-2.0
#include "saturating.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "base/check.h"
#include "base/parallel.h"
#include "contract/kernel.h"
#include "pack.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kCodesPerTask = 1 << 18;  // as in pack.cpp

// With a listed word in fewer codes than these, the int16 kernel is faster for one row, and not much slower for many (Sapphire
// Rapids). Weights of a normal distribution have about 150 to 250 codes for each such word, Student's t (5) 1200 to 4000.
constexpr std::int64_t kCodesPerListed = 320;

bool saturates(const std::int8_t* pair) { return std::abs(pair[0] + pair[1]) > kMaxPairSum; }

// Most lines have no such pair. This loop has no branch, so that the compiler makes a few vector instructions of it.
bool any_saturates(const std::int8_t* line) {
  int count = 0;
  for (int i = 0; i < kLineBytes; i += 2) count += saturates(line + i);
  return count > 0;
}

std::vector<std::uint16_t> words_of(const std::int8_t* strip, std::int64_t lines) {
  std::vector<std::uint16_t> words;
  for (std::int64_t line = 0; line < lines; ++line) {
    const std::int8_t* const codes = strip + line * kLineBytes;
    if (!any_saturates(codes)) continue;
    for (int j = 0; j < kStripColumns; ++j) {
      const std::int8_t* const word = codes + j * kLineK;
      if (saturates(word) || saturates(word + 2)) words.push_back(static_cast<std::uint16_t>(line * kStripColumns + j));
    }
  }
  return words;
}

}  // namespace

std::vector<std::int32_t> list_saturating(const std::int8_t* strips, std::int64_t n, std::int64_t k,
                                          std::int64_t most) {
  if (k > kMaxListedK) return {};
  const std::int64_t count = ceil_divide(n, kStripColumns), strip_bytes = ceil_divide(k, kTileK) * kTileBytes;
  std::vector<std::vector<std::uint16_t>> lists(static_cast<std::size_t>(count));
  const std::int64_t grain = std::max<std::int64_t>(1, kCodesPerTask / std::max<std::int64_t>(1, strip_bytes));
  std::atomic<std::int64_t> found{0};
  parallel(count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t strip = begin; strip < end && found <= most; ++strip) {
      auto& words = lists[static_cast<std::size_t>(strip)];
      words = words_of(strips + strip * strip_bytes, strip_bytes / kLineBytes);
      found += static_cast<std::int64_t>(words.size());
    }
  });
  if (found > most) return {};
  std::vector<std::int32_t> values{0};
  for (const auto& words : lists) values.push_back(values.back() + static_cast<std::int32_t>(words.size()));
  values.resize(values.size() + static_cast<std::size_t>(ceil_divide(values.back(), 2)));
  char* out = reinterpret_cast<char*>(values.data() + count + 1);
  for (const auto& words : lists) {
    const std::size_t bytes = words.size() * sizeof(std::uint16_t);
    if (bytes > 0) std::memcpy(out, words.data(), bytes);
    out += bytes;
  }
  return values;
}

std::vector<std::int32_t> useful_list(const std::int8_t* strips, std::int64_t n, std::int64_t k) {
  if (!active_kernel().byte_kernel) return {};
  return list_saturating(strips, n, k, packed_bytes(n, k) / kCodesPerListed);
}

SaturatingWords words_in(const char* op, const std::int32_t* values, std::int64_t count, std::int64_t n) {
  if (count == 0) return {};
  const std::int64_t strips = ceil_divide(n, kStripColumns);
  bool is_list = count > strips && values[0] == 0 && std::is_sorted(values, values + strips + 1);
  is_list = is_list && count == strips + 1 + ceil_divide(values[strips], 2);
  require(is_list, op, ": column_sum: the ", count, " values behind the sums of ", n,
          " columns do not list words; take column_sum as list_saturating makes it");
  return {values, reinterpret_cast<const std::uint16_t*>(values + strips + 1)};
}

}  // namespace octavo
