// SPDX-License-Identifier: Apache-2.0
// Numbers of rows, as an embedding is given them.
#pragma once

#include <cstdint>

namespace octavo {

struct Ids {
  const void* data;
  bool wide;  // int64, and int32 otherwise
  std::int64_t count;

  std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  }
};

}  // namespace octavo
