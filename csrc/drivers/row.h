// SPDX-License-Identifier: Apache-2.0
// How one row of activations becomes codes: in the same way for the linear layers and for the operators that hand codes to
// them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "contract/kernel.h"
#include "quantize.h"

namespace octavo {

constexpr RowQParams kNotFinite{std::numeric_limits<float>::quiet_NaN(), 0};  // all outputs of such a row are NaN

constexpr CodeRange code_range(bool symmetric) { return {symmetric ? 1 : 0, 255}; }

// How all rows of one call become codes.
struct RowQuantization {
  enum class Kind : std::uint8_t {
    symmetric,   // 8 bits, a scale for each row
    affine,      // 8 bits, a scale and a zero point for each row
    fixed,       // 8 bits, `input` for all rows
    to_16_bits,  // 16 bits, a scale for each row
  };
  Kind kind;
  RowQParams input{};
  std::int32_t column_sum_factor = 0;  // with Kind::fixed, what the epilogue takes for the zero point

  bool is_16_bit() const { return kind == Kind::to_16_bits; }
};

struct Row {
  const Kernel& kernel;
  const void* x;
  FloatType type;
  std::int64_t k;
  std::uint8_t* codes;
  std::int64_t distance;  // from the high bytes of 16-bit codes to the low bytes

  // Fills `codes` and returns what the epilogue needs to know of this row.
  RowQParams quantize(const RowQuantization& quantization) const {
    switch (quantization.kind) {
      case RowQuantization::Kind::symmetric: return quantize_dynamic(true);
      case RowQuantization::Kind::affine: return quantize_dynamic(false);
      case RowQuantization::Kind::to_16_bits: return quantize_to_16_bits();
      case RowQuantization::Kind::fixed: break;
    }
    return {quantize_static(quantization.input).scale, quantization.column_sum_factor};
  }

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
