// SPDX-License-Identifier: Apache-2.0
// One row of activations on its way to codes, the same for the layers and for what hands codes to them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "contract/kernel.h"
#include "quantize.h"

namespace octavo {

constexpr RowQParams kNotFinite{std::numeric_limits<float>::quiet_NaN(), 0};  // makes a row's outputs NaN

constexpr CodeRange code_range(bool symmetric) { return {symmetric ? 1 : 0, 255}; }

struct Row {
  const Kernel& kernel;
  const void* x;
  FloatType type;
  std::int64_t k;
  std::uint8_t* codes;
  std::int64_t distance;  // from the high bytes of 16-bit codes to the low ones

  RowQParams quantize_dynamic(bool symmetric) const {
    RowRange range{};
    if (symmetric) {
      range.max = kernel.absmax(x, type, k);
    } else {
      range = kernel.min_max(x, type, k);
    }
    if (!std::isfinite(range.max)) return clear(1);
    const CodeRange codes8 = code_range(symmetric);
    const RowQParams qparams = row_qparams(range, codes8, symmetric);
    kernel.quantize_row({x, type, k, 1.0f / qparams.scale, qparams.zero_point, codes8.qmin, codes8.qmax, codes});
    return qparams;
  }

  RowQParams quantize_static(RowQParams qparams) const {
    const CodeRange codes8 = code_range(false);
    const QuantizeRow row{x, type, k, 1.0f / qparams.scale, qparams.zero_point, codes8.qmin, codes8.qmax, codes};
    return kernel.quantize_row(row) ? qparams : kNotFinite;
  }

  RowQParams quantize_to_16_bits() const {
    const RowRange range{0.0f, kernel.absmax(x, type, k)};
    if (!std::isfinite(range.max)) return clear(2);
    const RowQParams qparams = row_qparams(range, {-kMax16, kMax16}, true);
    kernel.split_row({x, type, k, 1.0f / qparams.scale, codes, codes + distance});
    return qparams;
  }

  RowQParams clear(int rows) const {
    for (int row = 0; row < rows; ++row) std::memset(codes + row * distance, 0, static_cast<std::size_t>(k));
    return kNotFinite;
  }
};

}  // namespace octavo
