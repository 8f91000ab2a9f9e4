// SPDX-License-Identifier: Apache-2.0
// compile-flags:
// The float operators in plain C++: their executable definition, and all there is where nothing else can run.
#include "activations.h"
#include "isa/float/attention/attention.h"
#include "isa/float/attention/attention_few.h"
#include "isa/float/attention/attention_int8.h"
#include "isa/float/attention/codes_scalar.h"
#include "norms.h"
#include "rope.h"

namespace octavo {

extern const FloatKernel float_kernel_scalar;
const FloatKernel float_kernel_scalar = {
    "scalar",  // name
    0,         // rank
    0,         // features
    nullptr,   // base
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
