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

// out[i] = activation(x[i]), rounded to `type`; in place if out is x.
struct Activate {
  Activation activation;
  const void* x;
  FloatType x_type;
  std::int64_t count;
  void* out;
  FloatType type;
};

// One instruction set. A null function means: that of `base`.
struct FloatKernel {
  const char* name;
  int rank;  // on the scale of Kernel::rank: runs where the active kernel's rank is no lower
  std::uint32_t features;
  const FloatKernel* base;  // null only for scalar

  void (*activate)(const Activate&);
};

}  // namespace octavo
