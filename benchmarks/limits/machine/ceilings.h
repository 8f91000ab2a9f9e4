// SPDX-License-Identifier: Apache-2.0
// One instruction set's loops, in a file of its own because of its compile flags. main.cpp asks the CPU before calling.
#pragma once

#include <cstddef>

// The integer instruction on registers only: no load, no store. Returns operations; a multiplication and an addition
// are two.
double multiply_avx2();
double multiply_avx_vnni();
double multiply_avx512_vnni();

// The same of floats: fma on ymm and on zmm, and pairs of bfloat16 added up in float32.
double multiply_float_avx2();
double multiply_float_avx512();
double multiply_bfloat16_avx512();

// Reads every byte of [data, data + bytes), a multiple of 1024, and returns something that depends on all of them.
int read_avx2(const char* data, std::size_t bytes);
int read_avx512(const char* data, std::size_t bytes);

// What a loop found is added here, so that the compiler must run it.
extern volatile int sink;
