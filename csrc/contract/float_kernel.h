// SPDX-License-Identifier: Apache-2.0
// The contract between the drivers of float operators (activations, norms, attention) and the instruction sets
// (csrc/isa/float).
//
// As in kernel.h, an instruction set is one file that fills one table with plain functions over raw pointers. The algorithms
// are written once, in the headers of isa/float, over a Vector of 16 floats that each instruction set defines: one zmm
// register, two ymm registers or an array. All instruction sets add sums in the same order; docs/numerics.md says where their
// results differ nevertheless.
#pragma once

#include "kernel.h"

namespace octavo {

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu };

// out[i][j] = activation(x[i][j] + bias[j]), rounded to `type`. out may be x. Strides count elements, here and below.
struct Activate {
  Activation activation;
  const void* x;
  std::int64_t x_stride;
  FloatType x_type;
  std::int64_t rows, columns;
  void* out;
  std::int64_t out_stride;
  FloatType type;
  const float* bias = nullptr;  // null: none
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

// One row: sum = x + residual, rounded to `type`; y = LayerNorm(sum), or RMSNorm(sum) if `rms`.
struct Norm {
  const void* x;
  const void* residual;  // null: x itself is normalized, and sum is neither read nor written
  FloatType type;
  const float* weight;
  const float* bias;  // null: none
  float eps;
  bool rms;
  std::int64_t count;
  void* sum;
  void* y;
};

// Rotary position embedding of some rows. The first `rotated` elements of a row turn in pairs (j, j + rotated / 2) by the
// angles whose cosines and sines are given; the other elements are copied.
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

// --- products with weights of 16-bit floats ---

// A product takes at most so many k at a time, so that a tile of rows stays in the L1 cache, and rows of activations lie at a
// distance that is known when a kernel is compiled, and is no multiple of a power of two, which would share sets of the cache.
constexpr std::int64_t kHalfBlockK = 512, kHalfRowDistance = kHalfBlockK + 16;

// sums[i][j] = sums[i][j] + the sum over k of x[i][k] * weight[k][j]: one fma for each product, in ascending order of k.
struct HalfProduct {
  const float* x;               // rows at a distance of kHalfRowDistance
  const std::uint16_t* strips;  // H16 (layout.h), from the first k on
  std::int64_t strip_stride;    // from one strip to the next
  FloatType type;               // of the weight: bf16 or f16
  std::int64_t k;               // at most kHalfBlockK
  std::int64_t rows, strip_count;
  float* sums;  // each row has whole strips
  std::int64_t sums_stride;
};

// --- attention ---

// Keys are packed in blocks of kBlockKeys, and kTileQueries queries at a time look at a block. Longer blocks would save little
// rescaling, and a block's keys and values, 2 x 256 x 64 floats, leave room in an L2 cache of 256 KB.
constexpr std::int64_t kBlockKeys = 256, kTileQueries = 12;

// The rows of one batch item of a tensor [head][position][dimension]. Strides count bytes. The elements of a row are adjacent.
struct HeadRows {
  const void* data;
  FloatType type;
  std::int64_t head_stride, row_stride;
};

// look: a mask of bytes that are not 0 where a query may look; add: a mask of floats that are added to the scores.
enum class MaskKind : std::uint8_t { none, look, add };

// softmax(scale * q k^T + mask) v for some queries of `heads` heads, all of which share one head of keys and values.
struct Attention {
  HeadRows q, k, v;  // k and v have one head: their head_stride is not read
  MaskKind mask_kind;
  HeadRows mask;  // has a row for each query and a column for each key; strides may be 0
  void* out;      // of q's type
  std::int64_t out_head_stride, out_row_stride;
  std::int64_t heads, queries, keys, dimension;  // dimension: a multiple of 16
  std::int64_t
      visible;  // query i may look at the first `visible + i` keys; negative counts and counts beyond `keys` occur
  float scale, mask_scale;  // both contain the factor log2(e), because weights are computed as powers of two
  float* scratch;           // attention_scratch() floats, 64-byte aligned
  const Attention* next;    // what the same thread computes next, or null
};

constexpr std::int64_t padded_queries(std::int64_t queries) {
  return (queries + kTileQueries - 1) / kTileQueries * kTileQueries;
}

// How many floats one Attention needs: a block of keys and one of values; a tile of queries with its scores and its weights;
// the scales of codes; and for each row its sums and two more numbers.
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
  void (*multiply_half)(const HalfProduct&);

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
