// SPDX-License-Identifier: Apache-2.0
// isa/amx_int8.cpp once more, on the software model, under a name of its own.
#include "amx_model.h"

#define kernel_amx_int8 kernel_amx_model
#include "isa/integer/amx_int8.cpp"
