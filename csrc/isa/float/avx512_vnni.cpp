// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -Wno-maybe-uninitialized -Wno-uninitialized
// What gains from vpdpbusd, four products of 8 bits in each lane.
#include "isa/float/attention/attention_int8.h"
#include "isa/float/attention/codes_avx512_vnni.h"

namespace octavo {

extern const FloatKernel float_kernel_avx512;
extern const FloatKernel float_kernel_avx512_vnni;
const FloatKernel float_kernel_avx512_vnni = {
    "avx512_vnni",  // name
    26,             // rank
    kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni,
    &float_kernel_avx512,  // base
    nullptr,               // activate
    nullptr,               // silu_mul
    nullptr,               // norm
    nullptr,               // rotate
    nullptr,               // attention
    nullptr,               // attention_few
    nullptr,               // attention_bfloat16
    attention_int8<Codes>,
};

}  // namespace octavo
