// SPDX-License-Identifier: Apache-2.0
// Drivers of the float operators. They cut tensors into rows, share the rows out to threads and call the active FloatKernel.
#pragma once

#include "contract/float_kernel.h"

namespace octavo {

// The whole matrix: threads share out its rows, or pieces of its row if there is only one.
void activate(const Activate& all);
void silu_mul(const SiluMul& all);

// Norms of `rows` rows of n.count elements, which lie one after the other in x, residual, sum and y. If there is a residual,
// sum may be null all the same: then nobody wants it.
void norm_rows(const Norm& n, std::int64_t rows);

// norm_rows, and in addition the codes and scales that a symmetric linear_dynamic would give to the rows of y.
struct RowCodes {
  std::uint8_t* codes;
  std::int64_t stride;
  float* scale;
};
void norm_rows_to_codes(const Norm& n, std::int64_t rows, const RowCodes& out);

// x is [batch, heads, length, columns]; its strides count elements, and the last one is 1. cos and sin are [batch, length,
// rotated], and out is contiguous.
struct Rope {
  const void* x;
  FloatType type;
  std::int64_t batch, heads, length, columns;
  std::int64_t batch_stride, head_stride, row_stride;
  const void* cos;
  const void* sin;
  FloatType angle_type;
  std::int64_t angle_batch_stride, rotated;  // a stride of 0 gives the same angles to the whole batch
  void* out;
};
void rope(const Rope& all);

}  // namespace octavo
