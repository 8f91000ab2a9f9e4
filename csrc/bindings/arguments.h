// SPDX-License-Identifier: Apache-2.0
// Argument checks that the bindings of torch and of NumPy share. Plain C++, without types of torch and pybind11.
#pragma once

#include <cstdint>

#include "base/check.h"

namespace octavo {

inline void check_code_range(const char* op, std::int64_t qmin, std::int64_t qmax, std::int64_t low,
                             std::int64_t high) {
  require(low <= qmin && qmin < qmax && qmax <= high, op, ": qmin and qmax are ", qmin, " and ", qmax, "; need ", low,
          " <= qmin < qmax <= ", high);
}

// choose_qparams does not know the dtype of the codes, so it accepts any range of 16 bits.
inline void check_qparams_range(std::int64_t qmin, std::int64_t qmax, bool symmetric) {
  check_code_range("choose_qparams", qmin, qmax, -65536, 65535);
  require(!symmetric || (qmin + qmax) % 2 == 0, "choose_qparams: symmetric needs qmin + qmax even, got ", qmin, " and ",
          qmax, "; use [-127, 127] or [1, 255], or symmetric=False");
}

}  // namespace octavo
