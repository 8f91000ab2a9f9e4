// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c -mavxvnni -Wno-maybe-uninitialized -Wno-uninitialized
// A tile of 6 rows x 1 strip keeps 12 registers of sums; outputs lie on the stack. Rows are quantized as in avx2.cpp.
#include "lines_avx_vnni.h"

namespace octavo {
namespace {
constexpr int kPrefetchBytes = 6144, kPrefetchRows = 6, kStripsOfOneRow = 2;
}
}  // namespace octavo

#include "tiles_of_ymm.h"

namespace octavo {
namespace {

constexpr int kPanelRows = 7;

void multiply(const GroupProduct& p) { p.codes.bits == 8 ? multiply_form<SignedLines>(p) : multiply_packed(p); }

}  // namespace

extern const GroupKernel group_kernel_avx2;

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "avx_vnni";
  table.rank = 20;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c | kFeatureAvxVnni;
  table.base = &group_kernel_avx2;
  table.largest_byte_code = 255;
  table.direct_rows = kDirectRows;
  table.rows = kRows;
  table.rows_of_planes = kRowsOfPlanes;
  table.panel_rows = kPanelRows;
  table.panel_rows_of_bytes = 16;
  table.multiply = multiply;
  return table;
}

extern constexpr GroupKernel group_kernel_avx_vnni = make_table();

}  // namespace octavo
