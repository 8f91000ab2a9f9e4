// SPDX-License-Identifier: Apache-2.0
// The contract between the drivers of float operators (activations, norms, attention) and float_isa/*.cpp.
//
// As in kernel.h an instruction set is one file that fills one table with plain functions over raw pointers. The
// algorithms are written once, in float_isa/*.h, over a Vector of 16 floats that each instruction set defines: one zmm,
// two ymm or an array. Sums are added in the same order everywhere; docs/numerics.md says where instruction sets differ.
#pragma once

#include "kernel.h"

namespace octavo {

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu };

// out[i][j] = activation(x[i][j]), rounded to `type`; in place if out is x. Strides, here and below, in elements.
struct Activate {
  Activation activation;
  const void* x;
  std::int64_t x_stride;
  FloatType x_type;
  std::int64_t rows, columns;
  void* out;
  std::int64_t out_stride;
  FloatType type;
};

// out[i][j] = silu(gate[i][j]) * up[i][j].
struct SiluMul {
  const void* gate;
  std::int64_t gate_stride;
  const void* up;
  std::int64_t up_stride;
  FloatType type;
  std::int64_t rows, columns;
  void* out;
  std::int64_t out_stride;
};

// One row: sum = x + residual, rounded to `type`; y = LayerNorm or, if rms, RMSNorm of that.
struct Norm {
  const void* x;
  const void* residual;  // null: none, and sum is neither read nor written
  FloatType type;
  const float* weight;
  const float* bias;  // null: none
  float eps;
  bool rms;
  std::int64_t count;
  void* sum;
  void* y;
};

// Rows that turn by the angles of cos and sin: the first `rotated` elements in pairs (j, j + rotated / 2), the others stay.
struct Rotate {
  const void* x;
  std::int64_t x_stride;
  FloatType type;
  const void* cos;
  const void* sin;
  std::int64_t angle_stride;
  FloatType angle_type;
  std::int64_t rows, columns, rotated;
  void* out;
  std::int64_t out_stride;
};

// --- attention ---

// A block of keys is packed at a time, a tile of queries looks at it at a time. Longer blocks save little rescaling, and
// 2 x 256 x 64 floats leave room in an L2 cache of 256 KB.
constexpr std::int64_t kBlockKeys = 256, kTileQueries = 12;

// Rows of one tensor [head][position][dimension] of one batch item. Strides count bytes; a row is dense.
struct HeadRows {
  const void* data;
  FloatType type;
  std::int64_t head_stride, row_stride;
};

enum class MaskKind : std::uint8_t { none, look, add };  // look: bytes, not 0 where a query may look; add: floats

// softmax(scale * q k^T + mask) v for some queries of the `heads` heads that share one head of keys and values.
struct Attention {
  HeadRows q, k, v;  // the strides between heads of k and v are not read
  MaskKind mask_kind;
  HeadRows mask;  // a row for each query, a column for each key; strides may be 0
  void* out;      // of q's type
  std::int64_t out_head_stride, out_row_stride;
  std::int64_t heads, queries, keys, dimension;  // dimension: a multiple of 16
  std::int64_t
      visible;  // query i may look at the first `visible + i` keys; negative counts and counts beyond `keys` occur
  float scale, mask_scale;  // log2(e) included: weights are powers of two
  float* scratch;           // attention_scratch() floats, 64-byte aligned
  const Attention* next;    // what the same thread computes afterwards, or null
};

constexpr std::int64_t padded_queries(std::int64_t queries) {
  return (queries + kTileQueries - 1) / kTileQueries * kTileQueries;
}

// A block of keys and of values, a tile of queries, its scores and its weights; for each row the sums and two numbers;
// the scales of codes.
constexpr std::int64_t attention_scratch(std::int64_t heads, std::int64_t queries, std::int64_t dimension) {
  return (2 * kBlockKeys + kTileQueries) * dimension + 2 * kTileQueries * kBlockKeys + kBlockKeys + dimension + 32 +
         heads * padded_queries(queries) * (dimension + 2);
}

// The functions of an instruction set. As in KernelFunctions, a null one is inherited from `base`.
struct FloatKernelFunctions {
  void (*activate)(const Activate&);
  void (*silu_mul)(const SiluMul&);
  void (*norm)(const Norm&);
  void (*rotate)(const Rotate&);

  void (*attention)(const Attention&);           // products in float32
  void (*attention_few)(const Attention&);       // products in float32 for few queries, where nothing is packed
  void (*attention_bfloat16)(const Attention&);  // products of bfloat16, added in float32; null: the CPU has none
  void (*attention_int8)(const Attention&);      // products of 8-bit codes, whose sums are exact
};

// One instruction set: a constant, filled at compile time.
struct FloatKernel : FloatKernelFunctions {
  using Functions = FloatKernelFunctions;

  const char* name;
  int rank;                 // on the scale of Kernel::rank: this table serves active kernels of this rank and above
  std::uint32_t features;   // the CPU and the OS must have all of these
  const FloatKernel* base;  // the table to inherit from; null only for scalar
};

}  // namespace octavo
