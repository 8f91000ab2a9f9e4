// SPDX-License-Identifier: Apache-2.0
// The one prefetch that no compiler builtin gives.
#pragma once

namespace octavo {
namespace {  // each file has its own copy, so that no code of another instruction set is linked in

// Fetches a cache line that will be written soon. x86-64 CPUs without prefetchw ignore the instruction. __builtin_prefetch
// compiles to a prefetch for reading here, which gains nothing.
inline void prefetch_to_write(const void* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
  __builtin_prefetch(line, 1);
#endif
}

}  // namespace
}  // namespace octavo
