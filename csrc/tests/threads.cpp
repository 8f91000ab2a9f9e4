// SPDX-License-Identifier: Apache-2.0
// base/parallel.h for the test programs: one std::thread for each contiguous range, dealt out as torch's pool does.
#include "threads.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "base/parallel.h"

namespace octavo {

namespace {
int threads_in_use = 1;
}

void test::set_thread_count(int count) { threads_in_use = count; }

int thread_count() { return threads_in_use; }

void parallel_for(std::int64_t count, std::int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  if (count <= grain || threads_in_use == 1) return body(0, count, context);
  const std::int64_t chunk = (count + threads_in_use - 1) / threads_in_use;
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(threads_in_use));
  for (std::int64_t begin = 0; begin < count; begin += chunk) {
    std::exception_ptr& error = errors[threads.size()];
    threads.emplace_back([=, &error] {
      try {
        body(begin, std::min(count, begin + chunk), context);
      } catch (...) {
        error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace octavo
