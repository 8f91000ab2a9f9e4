// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c
// The float operators on pairs of ymm registers.
#include "activations.h"
#include "half_product.h"
#include "isa/float/attention/attention.h"
#include "isa/float/attention/attention_few.h"
#include "isa/float/attention/attention_int8.h"
#include "isa/float/attention/codes_avx2.h"
#include "norms.h"
#include "rope.h"

namespace octavo {

extern const FloatKernel float_kernel_scalar;

static constexpr FloatKernel make_table() {
  FloatKernel table{};
  table.name = "avx2";
  table.rank = 10;
  table.features = kFeatureAvx2 | kFeatureFma | kFeatureF16c;
  table.base = &float_kernel_scalar;
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

extern constexpr FloatKernel float_kernel_avx2 = make_table();

}  // namespace octavo
