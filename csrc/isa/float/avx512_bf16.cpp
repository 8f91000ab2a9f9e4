// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -Wno-maybe-uninitialized -Wno-uninitialized
// What gains from vdpbf16ps, the product of bfloat16 pairs added up in float32.
#include "isa/float/attention/attention_bfloat16.h"

namespace octavo {

extern const FloatKernel float_kernel_avx512_vnni;
extern const FloatKernel float_kernel_avx512_bf16;
const FloatKernel float_kernel_avx512_bf16 = {
    "avx512_bf16",  // name
    27,             // rank
    kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni | kFeatureAvx512bf16,
    &float_kernel_avx512_vnni,  // base
    nullptr,                    // activate
    nullptr,                    // silu_mul
    nullptr,                    // norm
    nullptr,                    // rotate
    nullptr,                    // attention
    nullptr,                    // attention_few
    attention_bfloat16,
    nullptr,  // attention_int8
};

}  // namespace octavo
