// SPDX-License-Identifier: Apache-2.0
// Finds the saturating words of a packed weight and lists them (contract/layout.h) in int32 values that lie behind its column
// sums: first the offsets, then two words in each value.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "contract/layout.h"

namespace octavo {

// The list for packed strips of n columns and k rows; empty if k is too long for one, and if there are more than `most` words.
std::vector<std::int32_t> list_saturating(const std::int8_t* strips, std::int64_t n, std::int64_t k,
                                          std::int64_t most = std::numeric_limits<std::int64_t>::max());

// The same, also empty where the list is of no use: the active instruction set does not read it, or so many words can saturate
// that the kernel without it is faster.
std::vector<std::int32_t> useful_list(const std::int8_t* strips, std::int64_t n, std::int64_t k);

// The list in `count` values for n columns; none in 0 values. Throws std::invalid_argument, which names the operator `op`, if
// the values are no such list.
SaturatingWords words_in(const char* op, const std::int32_t* values, std::int64_t count, std::int64_t n);

}  // namespace octavo
