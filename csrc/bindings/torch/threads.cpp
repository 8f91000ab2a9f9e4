// SPDX-License-Identifier: Apache-2.0
// base/parallel.h with torch's threads, through the stable ABI: torch.set_num_threads holds for Octavo as well, and no second
// pool of threads competes for the cores.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

#include "base/parallel.h"

namespace octavo {

void parallel_for(std::int64_t count, std::int64_t grain, Body body, void* context) {
  struct Call {
    Body body;
    void* context;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
  } call{body, context};
  // No exception may leave the callback: torch would turn it into "API call failed" and drop its type and its text.
  const auto guarded = [](std::int64_t begin, std::int64_t end, void* data) {
    auto& call = *static_cast<Call*>(data);
    try {
      call.body(begin, end, call.context);
    } catch (...) {
      if (!call.failed.exchange(true)) call.error = std::current_exception();
    }
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, guarded, &call));
  if (call.error) std::rethrow_exception(call.error);
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace octavo
