// SPDX-License-Identifier: Apache-2.0
// isa/avx_vnni.cpp once more, in EVEX encoding, under a name of its own.
#define OCTAVO_VPDPBUSD "%{evex%} vpdpbusd"
#define kernel_avx_vnni kernel_avx_vnni_evex
#include "isa/integer/avx_vnni.cpp"
