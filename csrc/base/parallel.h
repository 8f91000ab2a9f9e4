// SPDX-License-Identifier: Apache-2.0
// The one way to use several threads. The drivers call it; whoever links them defines it: bindings/torch_ops.cpp with
// torch's pool, the programs in tests/ with threads of their own. No OpenMP is linked.
#pragma once

#include <cstdint>

namespace octavo {

using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);

// Runs body over [0, count), each thread one contiguous range; on the caller alone if count <= grain.
// What a body throws reaches the caller, type and text.
void parallel_for(std::int64_t count, std::int64_t grain, Body body, void* context);

int thread_count();

// The same for a callable f(begin, end).
template <class F>
void parallel(std::int64_t count, std::int64_t grain, const F& f) {
  const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel_for(count, grain, call, const_cast<F*>(&f));
}

}  // namespace octavo
