// SPDX-License-Identifier: Apache-2.0
// Which kernel tables there are, which one is active, and why.
#pragma once

#include <string>
#include <vector>

#include "contract/float_kernel.h"
#include "contract/group_kernel.h"
#include "contract/kernel.h"

namespace octavo {

// Every kernel table compiled in, slowest first.
const std::vector<const Kernel*>& built_kernels();

// The tables that this CPU and this OS can run, slowest first. The scalar table is always among them.
const std::vector<const Kernel*>& runnable_kernels();

// The table that calls use now: the fastest runnable one within OCTAVO_MAX_ISA, or what use_kernel chose.
const Kernel& active_kernel();

// The table of float operators that goes with the active kernel: the fastest runnable one whose rank is no higher.
const FloatKernel& active_float_kernel();

// The table of products of groups that goes with the active kernel.
const GroupKernel& active_group_kernel();

// The tables of products of groups that this CPU and this OS can run, slowest first.
const std::vector<const GroupKernel*>& runnable_group_kernels();

// The tables of float operators that this CPU and this OS can run, slowest first.
const std::vector<const FloatKernel*>& runnable_float_kernels();

// Chooses the active kernel by name, for the whole process. An empty name returns to the automatic choice. If this CPU cannot
// run the kernel, throws std::invalid_argument with the names that it can run.
void use_kernel(const std::string& name);

// Why the active kernel is the active one, in one sentence.
std::string active_reason();

}  // namespace octavo
