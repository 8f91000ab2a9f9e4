// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -Wno-maybe-uninitialized -Wno-uninitialized
// A tile of 7 rows x 2 strips keeps 14 sums and 14 outputs in registers.
#include "lines_avx512.h"

namespace octavo {
namespace {
constexpr int kPrefetchBytes = 2048, kPrefetchRows = 2;
}
}  // namespace octavo

#include "product.h"
#include "rows.h"

namespace octavo {
namespace {

// Fewer rows leave registers for more strips: each activation is then loaded for fewer columns.
constexpr int strips_for(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 3 : 2; }
constexpr int kRows = 7, kRowsOfPlanes = 4, kPanelRows = 5;

template <class Form, int kTileRows>
void multiply_rows(const GroupProduct& p) {
  if (!p.planes) return multiply_strips<Form, kTileRows, strips_for(kTileRows), false>(p);
  if constexpr (kTileRows <= kRowsOfPlanes) multiply_strips<Form, kTileRows, kTileRows <= 2 ? 3 : 2, true>(p);
}

// Packed codes of fewer than 8 bits are read by few rows only: kPanelRows.
template <class Form>
void multiply_few(const GroupProduct& p) {
  switch (p.m) {
    case 1: return multiply_rows<Form, 1>(p);
    case 2: return multiply_rows<Form, 2>(p);
    case 3: return multiply_rows<Form, 3>(p);
    default: return multiply_rows<Form, 4>(p);
  }
}

template <class Form>
void multiply_many(const GroupProduct& p) {
  switch (p.m) {
    case 5: return multiply_rows<Form, 5>(p);
    case 6: return multiply_rows<Form, 6>(p);
    case 7: return multiply_rows<Form, 7>(p);
    default: return multiply_few<Form>(p);
  }
}

void multiply(const GroupProduct& p) {
  if (p.codes.table) return multiply_few<Table>(p);
  switch (p.codes.bits) {
    case 2: return multiply_few<Quarters>(p);
    case 3: return multiply_few<Thirds>(p);
    case 4: return multiply_few<Halves>(p);
    case 8: return multiply_many<SignedLines>(p);
    default: return multiply_many<Lines>(p);
  }
}

}  // namespace

extern const GroupKernel group_kernel_scalar;

static constexpr GroupKernel make_table() {
  GroupKernel table{};
  table.name = "avx512_vnni";
  table.rank = 30;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni;
  table.base = &group_kernel_scalar;
  table.largest_byte_code = 255;
  table.rows = kRows;
  table.rows_of_planes = kRowsOfPlanes;
  table.panel_rows = kPanelRows;
  table.panel_rows_of_bytes = 16;
  table.multiply = multiply;
  table.unpack_strip = unpack_strip;
  table.quantize_groups = quantize_groups;
  table.sum_units = sum_units;
  return table;
}

extern constexpr GroupKernel group_kernel_avx512_vnni = make_table();

}  // namespace octavo
