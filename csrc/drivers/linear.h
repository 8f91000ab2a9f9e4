// SPDX-License-Identifier: Apache-2.0
// The fused linear layers, from float activations to float outputs, and the plain integer product.
#pragma once

#include <cstdint>

#include "contract/float_kernel.h"

namespace octavo {

struct PackedWeight {
  const std::int8_t* strips;       // fastest if aligned to 64 bytes, because a line is then one cache line
  const std::int32_t* column_sum;  // [n]
  const float* scale;              // [n]
  const float* bias;               // [n] or null
  std::int64_t n;
  std::int64_t k;
  const std::int32_t* integer_bias =
      nullptr;  // [n] or null; linear_static adds it to the exact sums, the others ignore it
  SaturatingWords words = {};
};

struct Activations {
  const void* data;  // [m, k] contiguous
  FloatType type;
  std::int64_t m;
};

// Where the outputs [m, n] go. The activation function is applied in float32, before outputs are rounded to `type`.
struct Output {
  void* data;
  FloatType type;
  Activation activation = Activation::none;
};

// Each row of x is quantized to 8 bits with its own scale, either symmetric (zero point 128) or affine.
// A row that holds NaN or Inf gives a row of NaN and does not affect other rows.
void linear_dynamic(const Activations& x, const PackedWeight& weight, bool symmetric, Output out);

// All rows of x are quantized to 8 bits with the same scale and zero point, `input`, whose zero point belongs to codes
// -128 .. 127. Throws std::invalid_argument for an integer bias with which a sum could exceed int32.
void linear_static(const Activations& x, const PackedWeight& weight, RowQParams input, Output out);

// Each row of x is quantized to 16 bits with its own scale: int8 weights and nearly exact activations.
void linear_weight_only(const Activations& x, const PackedWeight& weight, Output out);

// Activation rows that are quantized already: codes 1 .. 255 with zero point 128.
struct CodedActivations {
  const std::uint8_t* codes;
  std::int64_t stride;  // codes from one row to the next
  const float* scale;   // [m]; where it is NaN, the row of outputs is NaN
  std::int64_t m;
};

// What a symmetric linear_dynamic does after it has quantized its rows. If k is a multiple of 64, kernels that read bytes
// read the codes where they are.
void linear_codes(const CodedActivations& x, const PackedWeight& weight, Output out);

// c [m, n] = a [m, k] x b [k, n], exact. a is uint8, or int8 if a_is_signed; k is at most kMaxExactK.
struct IntegerProduct {
  const void* a;
  bool a_is_signed;
  const std::int8_t* b;
  std::int64_t m, n, k;
  std::int32_t* c;
};
void int8_mm(const IntegerProduct& product);

}  // namespace octavo
