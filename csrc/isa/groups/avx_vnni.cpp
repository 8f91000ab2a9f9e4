// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c -mavxvnni -Wno-maybe-uninitialized -Wno-uninitialized
// A tile of 6 rows x 1 strip keeps 12 registers of sums; outputs lie on the stack. Rows are quantized as in avx2.cpp.
#include "lines_avx_vnni.h"

namespace octavo {
namespace {
constexpr int kPrefetchBytes = 6144, kPrefetchRows = 6;
}
}  // namespace octavo

#include "product.h"

namespace octavo {
namespace {

constexpr int kRows = 6, kRowsOfPlanes = 3, kPanelRows = 7;

template <class Form, int kTileRows>
void multiply_rows(const GroupProduct& p) {
  if (!p.planes) return multiply_strips<Form, kTileRows, kTileRows == 1 ? 2 : 1, false>(p);
  if constexpr (kTileRows <= kRowsOfPlanes) multiply_strips<Form, kTileRows, 1, true>(p);
}

template <class Form>
void multiply_form(const GroupProduct& p) {
  switch (p.m) {
    case 1: return multiply_rows<Form, 1>(p);
    case 2: return multiply_rows<Form, 2>(p);
    case 3: return multiply_rows<Form, 3>(p);
    case 4: return multiply_rows<Form, 4>(p);
    case 5: return multiply_rows<Form, 5>(p);
    default: return multiply_rows<Form, 6>(p);
  }
}

void multiply(const GroupProduct& p) {
  if (p.codes.table) return multiply_form<Table>(p);
  switch (p.codes.bits) {
    case 2: return multiply_form<Quarters>(p);
    case 3: return multiply_form<Thirds>(p);
    case 4: return multiply_form<Halves>(p);
    case 8: return multiply_form<SignedLines>(p);
    default: return multiply_form<Lines>(p);
  }
}

}  // namespace

extern const GroupKernel group_kernel_avx2;

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "avx_vnni";
  table.rank = 20;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c | kFeatureAvxVnni;
  table.base = &group_kernel_avx2;
  table.largest_byte_code = 255;
  table.rows = kRows;
  table.rows_of_planes = kRowsOfPlanes;
  table.panel_rows = kPanelRows;
  table.panel_rows_of_bytes = 16;
  table.multiply = multiply;
  return table;
}

extern constexpr GroupKernel group_kernel_avx_vnni = make_table();

}  // namespace octavo
