// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -Wno-maybe-uninitialized -Wno-uninitialized
// The float operators that gain from vdpbf16ps, which multiplies pairs of bfloat16 and adds in float32.
#include "isa/float/attention/attention_bfloat16.h"

namespace octavo {

extern const FloatKernel float_kernel_avx512_vnni;

static constexpr FloatKernel make_table() {
  FloatKernel table{};
  table.name = "avx512_bf16";
  table.rank = 27;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni |
                   kFeatureAvx512bf16;
  table.base = &float_kernel_avx512_vnni;
  table.attention_bfloat16 = attention_bfloat16;
  return table;
}

extern constexpr FloatKernel float_kernel_avx512_bf16 = make_table();

}  // namespace octavo
