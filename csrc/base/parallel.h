// SPDX-License-Identifier: Apache-2.0
// The one way to use several threads. The drivers call these functions, and the program that links the drivers defines them:
// the Python module in bindings/torch/threads.cpp, with torch's threads, and the test programs in tests/threads.cpp. No OpenMP
// is linked.
#pragma once

#include <cstdint>

namespace octavo {

using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);

// Runs `body` over [0, count): each thread gets one contiguous range, and the calling thread runs everything if count <= grain.
// An exception that `body` throws reaches the caller with its type and text.
void parallel_for(std::int64_t count, std::int64_t grain, Body body, void* context);

int thread_count();

// parallel_for with a callable f(begin, end).
template <class F>
void parallel(std::int64_t count, std::int64_t grain, const F& f) {
  const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel_for(count, grain, call, const_cast<F*>(&f));
}

}  // namespace octavo
