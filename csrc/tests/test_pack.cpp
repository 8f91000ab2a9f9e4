// SPDX-License-Identifier: Apache-2.0
// Packing int8 weights is a permutation, and the lists of saturating words hold just these.
#include <algorithm>

#include "int8_layer.h"
#include "registry/registry.h"
#include "threads.h"

namespace octavo::test {
namespace {

// Scalar code multiplies each pair of codes by the largest activations: a word is listed if int16 cannot hold a sum.
void test_only_words_that_can_saturate_are_listed() {
  for (const auto& [m, n, k] : {LayerShape{0, 1, 1}, {0, 17, 65}, {0, 40, 300}}) {
    const Int8Layer layer(n, k, 28);
    const std::int64_t strip_bytes = packed_bytes(1, k);
    const SaturatingWords words = layer.weight().words;
    for (std::int64_t strip = 0; strip * kStripColumns < n; ++strip) {
      const std::uint16_t* listed = words.words + words.offsets[strip];
      for (std::int64_t word = 0; word < strip_bytes / kLineK; ++word) {
        const std::int8_t* const codes = layer.strips.data() + strip * strip_bytes + word * kLineK;
        bool saturates = false;
        for (const int place : {0, 2}) {
          const int positive = std::max<int>(codes[place], 0) + std::max<int>(codes[place + 1], 0);
          const int negative = std::min<int>(codes[place], 0) + std::min<int>(codes[place + 1], 0);
          saturates = saturates || 255 * positive > 32767 || 255 * negative < -32768;
        }
        if (saturates) EXPECT(*listed++ == word, "n=%ld word %ld", static_cast<long>(n), static_cast<long>(word));
      }
      EXPECT(listed == words.words + words.offsets[strip + 1], "no other words in strip %ld", static_cast<long>(strip));
    }
  }
  EXPECT(list_saturating(std::vector<std::int8_t>(packed_bytes(1, kMaxListedK + 1)).data(), 1, kMaxListedK + 1).empty(),
         "words of a longer strip have no number");
}

void test_few_words_are_a_useful_list() {
  constexpr std::int64_t n = 32, k = 640;  // 20,480 codes, of which each 320 may have a listed word
  std::vector<std::int8_t> strips(static_cast<std::size_t>(packed_bytes(n, k)));
  const auto count = [&] { return useful_list(strips.data(), n, k).size(); };
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    std::fill(strips.begin(), strips.end(), std::int8_t{64});
    const bool reads_lists = kernel->byte_kernel != nullptr;
    EXPECT(count() == (reads_lists ? 3 : 0), "%s: nothing listed, and 3 offsets", kernel->name);
    for (std::size_t word = 0; word < 64; ++word) strips[2 * word * 4] = 65;
    EXPECT(count() == (reads_lists ? 3 + 32 : 0), "%s: 64 words", kernel->name);
    strips.back() = 65;
    EXPECT(count() == 0, "%s: one too many", kernel->name);
  }
  use_kernel("");
}

void test_unpack_gives_back_every_code() {
  for (const auto& [m, n, k] : {LayerShape{0, 1, 1}, {0, 16, 64}, {0, 17, 65}, {0, 33, 130}, {0, 40, 3}}) {
    for (const int threads : {1, 3}) {
      set_thread_count(threads);
      const Int8Layer layer(n, k, 21);
      std::vector<std::int8_t> codes(layer.codes.size());
      unpack_weight(layer.strips.data(), n, k, codes.data());
      EXPECT(codes == layer.codes, "n=%ld k=%ld", static_cast<long>(n), static_cast<long>(k));
      std::int64_t sum = 0, packed_sum = 0, column_sums = 0;
      for (const std::int8_t code : layer.codes) sum += code;
      for (const std::int8_t code : layer.strips) packed_sum += code;
      for (const std::int32_t column : layer.column_sum) column_sums += column;
      EXPECT(sum == packed_sum && sum == column_sums, "padding is zero and column sums add up, n=%ld k=%ld",
             static_cast<long>(n), static_cast<long>(k));
    }
  }
  set_thread_count(1);
}

}  // namespace
}  // namespace octavo::test

int main() {
  using namespace octavo::test;
  test_only_words_that_can_saturate_are_listed();
  test_few_words_are_a_useful_list();
  test_unpack_gives_back_every_code();
  return 0;
}
