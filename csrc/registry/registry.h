// SPDX-License-Identifier: Apache-2.0
// What the CPU and the OS allow, which kernel table is active, and why.
#pragma once

#include <string>
#include <vector>

#include "contract/float_kernel.h"
#include "contract/kernel.h"

namespace octavo {

// Every kernel table compiled in, slowest first.
const std::vector<const Kernel*>& built_kernels();

// Those that this CPU and OS can run, slowest first; scalar is always among them. AMX is asked of the OS here, once.
const std::vector<const Kernel*>& runnable_kernels();

// The table that calls use now: the fastest runnable one within OCTAVO_MAX_ISA, or what use_kernel chose.
const Kernel& active_kernel();

// The float operators that go with it: the fastest runnable ones whose rank is no higher than its own.
const FloatKernel& active_float_kernel();

// Those that this CPU and OS can run, slowest first.
const std::vector<const FloatKernel*>& runnable_float_kernels();

// Chooses by name for the whole process; an empty name goes back to the automatic choice.
// Throws std::invalid_argument that lists the runnable names if this CPU cannot run it.
void use_kernel(const std::string& name);

// One sentence: why the active kernel is the active one.
std::string active_reason();

}  // namespace octavo
