// SPDX-License-Identifier: Apache-2.0
// Memory that one thread reuses from call to call, and that only grows. Calls do not nest, so one buffer for each purpose is
// enough.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "memory.h"

namespace octavo {

class Scratch {
 public:
  std::uint8_t* get(std::int64_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 4095) / 4096 * 4096;
      data_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, static_cast<std::size_t>(size_))));
      if (!data_) {
        size_ = 0;
        throw OutOfMemory(bytes, "scratch of a kernel");
      }
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(std::uint8_t* data) const { std::free(data); }
  };
  std::unique_ptr<std::uint8_t, Free> data_;
  std::int64_t size_ = 0;
};

}  // namespace octavo
