// SPDX-License-Identifier: Apache-2.0
// The driver of attention: which kernel, and which queries of which heads each thread takes.
#pragma once

#include "contract/float_kernel.h"

namespace octavo {

enum class Precision : std::uint8_t { automatic, float32, bfloat16, int8 };

struct AttentionShape {
  std::int64_t batch, heads, kv_heads, queries, keys, dimension;
};

// A tensor [batch][head][position][dimension].
struct HeadTensor {
  HeadRows rows;
  std::int64_t batch_stride;
};

struct AttentionTensors {
  HeadTensor q, k, v;
  MaskKind mask_kind;
  HeadTensor mask;  // has a row for each query; strides may be 0
  void* out;        // contiguous [batch][position][head][dimension], with q's type
};

// Query i looks at all keys or, if `causal`, at the keys up to i + keys - queries. A query that sees no key gives zeros.
// Throws std::invalid_argument if the active kernel does not have `precision`.
void attention(const AttentionShape& shape, const AttentionTensors& tensors, bool causal, float scale,
               Precision precision);

}  // namespace octavo
