// SPDX-License-Identifier: Apache-2.0
// The torch face of the float operators: schemas, argument checks, outputs.
#include <cstdint>

#include "../float_ops.h"
#include "torch_tensors.h"

namespace octavo {

namespace {

// ops/activations.py turns names into these numbers.
Activation activation_of(const char* op, std::int64_t activation) {
  require(activation >= 0 && activation <= static_cast<std::int64_t>(Activation::silu), op,
          ": activation must be 0 (none), 1 (relu), 2 (gelu), 3 (gelu_tanh) or 4 (silu), is ", activation);
  return static_cast<Activation>(activation);
}

Tensor activate_op(const Tensor& x_any, std::int64_t activation) {
  const FloatType type = float_type("activate", "x", x_any.scalar_type());
  const Tensor x = dense(x_any);
  const Tensor out = empty(Sizes(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  activate({activation_of("activate", activation), x.const_data_ptr(), type, x.numel(), out.mutable_data_ptr(), type});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) { m.def("activate(Tensor x, int activation) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) { m.impl("activate", TORCH_BOX(&activate_op)); }

}  // namespace octavo
