// SPDX-License-Identifier: Apache-2.0
// What weights in groups are worth: all of them as floats, or some rows.
#pragma once

#include "drivers/ids.h"
#include "group_linear.h"

namespace octavo {

// The weight [n, k] as linear_groups reads it: scale * (u - offset) + minimum, rounded once to float32, times column_scale.
void dequantize_groups(const GroupWeight& weight, void* out, FloatType type);

// The rows `ids` of that matrix, [count, k]. Every id is one of its rows.
void embedding_groups(const GroupWeight& weight, const Ids& ids, void* out, FloatType type);

}  // namespace octavo
