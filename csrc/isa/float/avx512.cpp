// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized -Wno-uninitialized
// The float operators on zmm registers.
#include "activations.h"
#include "isa/float/attention/attention.h"
#include "isa/float/attention/attention_few.h"
#include "norms.h"
#include "rope.h"

namespace octavo {

extern const FloatKernel float_kernel_scalar;
extern const FloatKernel float_kernel_avx512;
const FloatKernel float_kernel_avx512 = {
    "avx512",  // name
    25,        // rank
    kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl,
    &float_kernel_scalar,  // base
    activate,
    silu_mul,
    norm,
    rotate,
    attention,
    attention_few,
    nullptr,  // attention_bfloat16
    nullptr,  // attention_int8
};

}  // namespace octavo
