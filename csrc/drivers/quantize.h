// SPDX-License-Identifier: Apache-2.0
// Scales and zero points of rows, and real values to codes and back. A row is a set of values that share one scale: the whole
// tensor, a channel, a group or a token. Callers bring every granularity into this form.
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

// Scale and zero point of a row whose values lie in [range.min, range.max], which contains 0: docs/numerics.md, eq. 2 and 3.
RowQParams row_qparams(RowRange range, CodeRange codes, bool symmetric);

// Throws std::invalid_argument that names the first row with NaN or Inf.
void choose_qparams(const void* x, FloatType type, Rows shape, CodeRange codes, bool symmetric, float* scale,
                    std::int32_t* zero_point);

void quantize(const void* x, FloatType type, Rows shape, CodeRange range, const float* scale,
              const std::int32_t* zero_point, std::uint8_t* codes);

void dequantize(const std::uint8_t* codes, bool is_signed, Rows shape, const float* scale,
                const std::int32_t* zero_point, void* out, FloatType type);

}  // namespace octavo
