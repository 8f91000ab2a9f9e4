// SPDX-License-Identifier: Apache-2.0
// compile-flags:
// The float operators in plain C++: the executable definition of what they do, and the table for CPUs that can run no other.
#include "activations.h"
#include "half_product.h"
#include "isa/float/attention/attention.h"
#include "isa/float/attention/attention_few.h"
#include "isa/float/attention/attention_int8.h"
#include "isa/float/attention/codes_scalar.h"
#include "norms.h"
#include "rope.h"

namespace octavo {

static constexpr FloatKernel make_table() {
  FloatKernel table{};
  table.name = "scalar";
  table.activate = activate;
  table.silu_mul = silu_mul;
  table.norm = norm;
  table.rotate = rotate;
  table.multiply_half = multiply_half;
  table.attention = attention;
  table.attention_few = attention_few;
  table.attention_int8 = attention_int8<CodeWords>;
  return table;
}

extern constexpr FloatKernel float_kernel_scalar = make_table();

}  // namespace octavo
