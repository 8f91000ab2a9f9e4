// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#include <algorithm>

#include "base/check.h"
#include "base/memory.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "quantize.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::int64_t kMostRows =
    512;  // the sums of a unit with so many rows fit in the L2 cache beside a block of keys
constexpr std::int64_t kLeastQueries = 4 * kTileQueries;  // fewer queries would not pay for packing the keys
constexpr std::int64_t kFewRows = 6;                      // up to so many rows read keys that are not packed
constexpr std::int64_t kGrain = 1 << 18;                  // so few products do not pay for waking a second thread

thread_local Scratch scratch;

using Attend = void (*)(const Attention&);

// The kernel depends on nothing but the shape of one batch item, so that a batch gives the same bits however it is cut.
Attend attend_for(const AttentionShape& shape, Precision precision) {
  const FloatKernel& kernel = active_float_kernel();
  require(precision != Precision::bfloat16 || kernel.attention_bfloat16 != nullptr,
          "attention: precision is 'bfloat16', but the active float kernel ", kernel.name,
          " has no products of bfloat16 (they need AVX512_BF16); use precision='auto' or 'float32'");
  if (shape.heads / shape.kv_heads * shape.queries <= kFewRows) return kernel.attention_few;
  if (precision == Precision::int8) return kernel.attention_int8;
  return precision != Precision::float32 && kernel.attention_bfloat16 ? kernel.attention_bfloat16 : kernel.attention;
}

// How many queries a unit of work has. Rows do not depend on each other: any number gives the same bits.
std::int64_t queries_of_unit(const AttentionShape& shape) {
  const std::int64_t group = shape.heads / shape.kv_heads, pairs = shape.batch * shape.kv_heads;
  const std::int64_t wanted = (4 * thread_count() + pairs - 1) / pairs;  // units of one head of keys
  const std::int64_t even = padded_queries((shape.queries + wanted - 1) / wanted);
  const std::int64_t most = std::max(kMostRows / group / kTileQueries, std::int64_t{1}) * kTileQueries;
  return std::min(std::max(even, kLeastQueries), most);
}

// The rows of a tensor from a batch item, a head and a position on.
HeadRows from(const HeadTensor& tensor, std::int64_t batch, std::int64_t head, std::int64_t position) {
  HeadRows rows = tensor.rows;
  rows.data = static_cast<const char*>(rows.data) + batch * tensor.batch_stride + head * rows.head_stride +
              position * rows.row_stride;
  return rows;
}

struct Unit {
  std::int64_t batch, kv_head, query, queries;
};

Attention attention_of(const AttentionShape& shape, const AttentionTensors& tensors, bool causal, const Unit& unit) {
  const std::int64_t group = shape.heads / shape.kv_heads, head = unit.kv_head * group;
  Attention a{};
  a.q = from(tensors.q, unit.batch, head, unit.query);
  a.k = from(tensors.k, unit.batch, unit.kv_head, 0);
  a.v = from(tensors.v, unit.batch, unit.kv_head, 0);
  a.mask_kind = tensors.mask_kind;
  a.mask = from(tensors.mask, unit.batch, head, unit.query);
  a.out_head_stride = shape.dimension * bytes_of(tensors.q.rows.type);
  a.out_row_stride = shape.heads * a.out_head_stride;
  a.out = static_cast<char*>(tensors.out) + (unit.batch * shape.queries + unit.query) * a.out_row_stride +
          head * a.out_head_stride;
  a.heads = group;
  a.queries = unit.queries;
  a.keys = shape.keys;
  a.dimension = shape.dimension;
  a.visible = causal ? shape.keys - shape.queries + unit.query + 1 : shape.keys;
  return a;
}

}  // namespace

void attention(const AttentionShape& shape, const AttentionTensors& tensors, bool causal, float scale,
               Precision precision) {
  const Attend attend = attend_for(shape, precision);
  if (shape.batch == 0 || shape.queries == 0) return;
  const std::int64_t queries = queries_of_unit(shape), chunks = (shape.queries + queries - 1) / queries;
  const std::int64_t group = shape.heads / shape.kv_heads;
  const std::int64_t products =
      saturating_product({group, std::min(queries, shape.queries), shape.keys, shape.dimension});
  const auto grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(products, 1));
  parallel(shape.batch * shape.kv_heads * chunks, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t floats = attention_scratch(group, queries, shape.dimension);
    auto* const memory = reinterpret_cast<float*>(scratch.get(floats * static_cast<std::int64_t>(sizeof(float))));
    const auto unit = [&](std::int64_t i) {
      const std::int64_t pair = i / chunks, query = i % chunks * queries;
      Attention a =
          attention_of(shape, tensors, causal,
                       {pair / shape.kv_heads, pair % shape.kv_heads, query, std::min(queries, shape.queries - query)});
      a.scale = static_cast<float>(scale * kLog2E);
      a.mask_scale = static_cast<float>(kLog2E);
      a.scratch = memory;
      return a;
    };
    Attention now = unit(begin);
    for (std::int64_t i = begin; i < end; ++i) {
      const Attention next = i + 1 < end ? unit(i + 1) : Attention{};
      now.next = i + 1 < end ? &next : nullptr;
      attend(now);
      now = next;
    }
  });
}

}  // namespace octavo
