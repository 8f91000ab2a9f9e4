// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized -Wno-uninitialized
// The float operators on zmm registers.
#include "activations.h"
#include "half_product.h"
#include "isa/float/attention/attention.h"
#include "isa/float/attention/attention_few.h"
#include "norms.h"
#include "rope.h"

namespace octavo {

extern const FloatKernel float_kernel_scalar;

static constexpr FloatKernel make_table() {
  FloatKernel table{};
  table.name = "avx512";
  table.rank = 25;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl;
  table.base = &float_kernel_scalar;
  table.activate = activate;
  table.silu_mul = silu_mul;
  table.norm = norm;
  table.rotate = rotate;
  table.multiply_half = multiply_half;
  table.attention = attention;
  table.attention_few = attention_few;
  return table;
}

extern constexpr FloatKernel float_kernel_avx512 = make_table();

}  // namespace octavo
