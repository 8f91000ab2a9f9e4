// SPDX-License-Identifier: Apache-2.0
// Tiles for sixteen ymm registers: 6 rows x 1 strip keep 12 registers of sums, outputs lie on the stack. Packed codes are read by
// any number of rows.
#pragma once

#include "product.h"

namespace octavo {
namespace {

constexpr int kRows = 6, kRowsOfPlanes = 3;

template <class Form, int kTileRows>
void multiply_rows(const GroupProduct& p) {
  if (!p.planes) return multiply_strips<Form, kTileRows, kTileRows == 1 ? kStripsOfOneRow : 1, false>(p);
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

// Codes of fewer than 8 bits, and lines that unpack_strip has written.
void multiply_packed(const GroupProduct& p) {
  if constexpr (kAddsInWords) {
    if (p.codes.wide) return multiply_form<WideTable>(p);
  }
  if (p.codes.table) return multiply_form<Table>(p);
  switch (p.codes.bits) {
    case 2: return multiply_form<Quarters>(p);
    case 3: return multiply_form<Thirds>(p);
    case 4: return multiply_form<Halves>(p);
    default: return multiply_form<Lines>(p);
  }
}

}  // namespace
}  // namespace octavo
