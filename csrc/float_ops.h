// SPDX-License-Identifier: Apache-2.0
// Drivers of the float operators: they cut tensors into rows, share these out to threads and call the active FloatKernel.
#pragma once

#include "float_kernel.h"

namespace octavo {

void activate(const Activate& elements);

}  // namespace octavo
