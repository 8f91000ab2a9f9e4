// SPDX-License-Identifier: Apache-2.0
// Compiles isa/integer/amx_int8.cpp once more, on the software model and under another name.
#include "amx_model.h"

#define kernel_amx_int8 kernel_amx_model
#include "isa/integer/amx_int8.cpp"
