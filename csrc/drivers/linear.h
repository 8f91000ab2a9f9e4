// SPDX-License-Identifier: Apache-2.0
// The fused linear layers and the plain integer product: quantize rows, walk tiles and threads, epilogue.
#pragma once

#include <cstdint>

#include "contract/float_kernel.h"

namespace octavo {

struct PackedWeight {
  const std::int8_t* strips;       // fastest at a multiple of 64 bytes, where a line is one cache line
  const std::int32_t* column_sum;  // [n]
  const float* scale;              // [n]
  const float* bias;               // [n] or null
  std::int64_t n;
  std::int64_t k;
  const std::int32_t* integer_bias = nullptr;  // [n] or null: added to the exact sums, by linear_static only
};

struct Activations {
  const void* data;  // [m, k] contiguous
  FloatType type;
  std::int64_t m;
};

// Where [m, n] outputs go, and what is done to them in float32 before they are rounded to `type`.
struct Output {
  void* data;
  FloatType type;
  Activation activation = Activation::none;
};

// Each row of x is quantized on its own to 8 bits, symmetric (zero point 128) or affine.
// A row that holds NaN or Inf gives a row of NaN; other rows do not notice.
void linear_dynamic(const Activations& x, const PackedWeight& weight, bool symmetric, Output out);

// The same with one scale and zero point for all of x, chosen beforehand: codes -128 .. 127, as int8 counts them.
// Refuses an integer bias with which a sum could leave int32.
void linear_static(const Activations& x, const PackedWeight& weight, RowQParams input, Output out);

// The same with rows quantized to 16 bits, split into two planes of 8: int8 weights, near-float activations.
void linear_weight_only(const Activations& x, const PackedWeight& weight, Output out);

// Rows that are codes 1 .. 255 around 128 already.
struct CodedActivations {
  const std::uint8_t* codes;
  std::int64_t stride;  // from one row to the next
  const float* scale;   // [m]; NaN makes a row of NaN
  std::int64_t m;
};

// linear_dynamic, symmetric, from its codes on. Kernels of bytes read codes where they are if k is a multiple of 64.
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
