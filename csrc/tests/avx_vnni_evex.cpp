// SPDX-License-Identifier: Apache-2.0
// Compiles isa/integer/avx_vnni.cpp once more, in EVEX encoding and under another name.
#define OCTAVO_VPDPBUSD "%{evex%} vpdpbusd"
#define kernel_avx_vnni kernel_avx_vnni_evex
#include "isa/integer/avx_vnni.cpp"
