// SPDX-License-Identifier: Apache-2.0
// Drivers of the float operators: they cut tensors into rows, share these out to threads and call the active FloatKernel.
#pragma once

#include "contract/float_kernel.h"

namespace octavo {

// Of `rows` rows of `columns`; a single row is shared out in pieces.
void activate(const Activate& all);
void silu_mul(const SiluMul& all);

// Rows of n.count, one after another in x, residual, sum and y. With a residual sum may be null: nobody wants it.
void norm_rows(const Norm& n, std::int64_t rows);

// The same, and the codes and scales that linear_dynamic, symmetric, would give the rows of y.
struct RowCodes {
  std::uint8_t* codes;
  std::int64_t stride;
  float* scale;
};
void norm_rows_to_codes(const Norm& n, std::int64_t rows, const RowCodes& out);

// x [batch, heads, length, columns], strides in elements, the last 1; cos and sin [batch, length, rotated]; out contiguous.
struct Rope {
  const void* x;
  FloatType type;
  std::int64_t batch, heads, length, columns;
  std::int64_t batch_stride, head_stride, row_stride;
  const void* cos;
  const void* sin;
  FloatType angle_type;
  std::int64_t angle_batch_stride, rotated;  // 0: all of the batch has the same angles
  void* out;
};
void rope(const Rope& all);

}  // namespace octavo
