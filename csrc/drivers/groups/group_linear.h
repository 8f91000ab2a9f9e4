// SPDX-License-Identifier: Apache-2.0
// Linear layers whose weight has a scale for each group of k: integers of 2 to 8 bits, codebooks, GGML blocks.
#pragma once

#include "contract/float_kernel.h"
#include "contract/group_kernel.h"
#include "drivers/linear.h"

namespace octavo {

struct GroupWeight {
  GroupCodes codes;
  GroupScales scales;
  std::int64_t group_size;  // a multiple of kUnitK; 0: one group for all of k
  std::int32_t offset;
  const float* column_scale;  // [n] or null
  const float* bias;          // [n] or null
  std::int64_t n, k;
};

// How activations become codes: 8 or 16 bits, with a scale for each row and so many elements of k, a multiple of 32; 0: one
// scale for each row.
struct GroupInput {
  int bits;
  std::int64_t group_size;
};

// A row that holds NaN or Inf gives a row of NaN and does not affect other rows.
void linear_groups(const Activations& x, const GroupWeight& weight, GroupInput input, Output out);

// How many units of 16 k a segment has: docs/numerics.md.
int segment_units(std::int64_t weight_group, std::int64_t input_group);

}  // namespace octavo
