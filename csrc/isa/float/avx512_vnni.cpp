// SPDX-License-Identifier: Apache-2.0
// compile-flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -Wno-maybe-uninitialized -Wno-uninitialized
// The float operators that gain from vpdpbusd, which adds up four products of 8 bits in each lane.
#include "isa/float/attention/attention_int8.h"
#include "isa/float/attention/codes_avx512_vnni.h"

namespace octavo {

extern const FloatKernel float_kernel_avx512;

static constexpr FloatKernel make_table() {
  FloatKernel table{};
  table.name = "avx512_vnni";
  table.rank = 26;
  table.features = kFeatureAvx512f | kFeatureAvx512bw | kFeatureAvx512dq | kFeatureAvx512vl | kFeatureAvx512vnni;
  table.base = &float_kernel_avx512;
  table.attention_int8 = attention_int8<CodeWords>;
  return table;
}

extern constexpr FloatKernel float_kernel_avx512_vnni = make_table();

}  // namespace octavo
