// SPDX-License-Identifier: Apache-2.0
// What the CPU and the OS allow.
#pragma once

#include "contract/kernel.h"

namespace octavo {

// The Features, as bits, that this CPU has and whose registers the OS saves. Linux is asked for the use of AMX here, so
// one call for the process is enough.
std::uint32_t detect_features();

}  // namespace octavo
