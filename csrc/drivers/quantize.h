// SPDX-License-Identifier: Apache-2.0
// Scale and zero point of rows, and codes <-> reals by them. A row is whatever shares one scale: the whole tensor, a
// channel, a group or a token; the callers bring every granularity into this form.
#pragma once

#include <cstdint>

#include "contract/kernel.h"

namespace octavo {

struct Rows {
  std::int64_t rows;
  std::int64_t columns;
};

struct CodeRange {
  std::int32_t qmin;
  std::int32_t qmax;
};

// Scale and zero point for a row whose values span [range.min, range.max] (0 included). numerics.md, eq. 2 and 3.
RowQParams row_qparams(RowRange range, CodeRange codes, bool symmetric);

// Throws std::invalid_argument naming the first row that holds NaN or Inf.
void choose_qparams(const void* x, FloatType type, Rows shape, CodeRange codes, bool symmetric, float* scale,
                    std::int32_t* zero_point);

void quantize(const void* x, FloatType type, Rows shape, CodeRange range, const float* scale,
              const std::int32_t* zero_point, std::uint8_t* codes);

void dequantize(const std::uint8_t* codes, bool is_signed, Rows shape, const float* scale,
                const std::int32_t* zero_point, void* out, FloatType type);

}  // namespace octavo
