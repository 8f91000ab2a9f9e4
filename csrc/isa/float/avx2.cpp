// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx2 -mfma -mf16c
// The float operators on pairs of ymm registers.
#include "activations.h"
#include "isa/float/attention/attention.h"
#include "isa/float/attention/attention_few.h"
#include "isa/float/attention/attention_int8.h"
#include "isa/float/attention/codes_avx2.h"
#include "norms.h"
#include "rope.h"

namespace octavo {

extern const FloatKernel float_kernel_scalar;
extern const FloatKernel float_kernel_avx2;
const FloatKernel float_kernel_avx2 = {
    "avx2",  // name
    10,      // rank
    kFeatureAvx2 | kFeatureFma | kFeatureF16c,
    &float_kernel_scalar,  // base
    activate,
    silu_mul,
    norm,
    rotate,
    attention,
    attention_few,
    nullptr,  // attention_bfloat16
    attention_int8<Codes>,
};

}  // namespace octavo
