// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c -Wno-maybe-uninitialized -Wno-uninitialized
// vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in int16. With codes of at most 127 a pair is exact;
// with codes of at most 4 bits, 8 of them can be added before they are widened to int32, which is the fastest way that AVX2
// has. Codes of 8 bits are multiplied as words, by vpmaddwd, in product_of_words.h.
//
// Packed codes are read directly by any number of rows: unpacking them into the cache first was no faster for 4 and 2 bits
// (Zen 3), only for 3. Weights are prefetched 6 KB ahead.
#include "lines_avx2.h"

namespace octavo {
namespace {

constexpr int kPrefetchBytes = 6144, kPrefetchRows = 6, kStripsOfOneRow = 1;

}  // namespace
}  // namespace octavo

#include "product_of_words.h"
#include "rows.h"
#include "tiles_of_ymm.h"

namespace octavo {
namespace {

void multiply(const GroupProduct& p) { p.codes.bits == 8 ? multiply_words(p) : multiply_packed(p); }

}  // namespace

extern const GroupKernel group_kernel_scalar;

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "avx2";
  table.rank = 10;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c;
  table.base = &group_kernel_scalar;
  table.largest_byte_code = 127;
  table.rows = kRows;
  table.rows_of_planes = kRowsOfPlanes;
  table.direct_rows = kDirectRows;
  table.panel_rows = 1 << 30;
  table.multiply = multiply;
  table.unpack_strip = unpack_strip;
  table.quantize_groups = quantize_groups;
  table.sum_units = sum_units;
  return table;
}

extern constexpr GroupKernel group_kernel_avx2 = make_table();

}  // namespace octavo
