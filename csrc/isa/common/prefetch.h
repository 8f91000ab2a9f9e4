// SPDX-License-Identifier: Apache-2.0
// The one prefetch that needs an instruction of its own.
#pragma once

namespace octavo {
namespace {  // each file its own copy: nothing to be linked to from elsewhere

// A line of cache to be written soon. x86-64 CPUs without prefetchw take it for a no-op; __builtin_prefetch would give a
// prefetch for reading here, which gains nothing.
inline void prefetch_to_write(const void* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
  __builtin_prefetch(line, 1);
#endif
}

}  // namespace
}  // namespace octavo
