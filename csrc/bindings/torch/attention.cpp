// SPDX-License-Identifier: Apache-2.0
// The torch operator `attention`: schema, argument checks, output.
#include "drivers/attention.h"

#include <array>
#include <cstdint>
#include <optional>

#include "tensors.h"

namespace octavo {

namespace {

using Strides = std::array<std::int64_t, 4>;

HeadTensor head_tensor(const Tensor& t, FloatType type, const Strides& strides) {
  const std::int64_t bytes = t.element_size();
  return {{t.const_data_ptr(), type, strides[1] * bytes, strides[2] * bytes}, strides[0] * bytes};
}

// t itself if the elements of its rows are adjacent, whatever its other strides; otherwise a contiguous copy.
Tensor with_dense_rows(const char* name, const Tensor& t) {
  require(t.dim() == 4, "attention: ", name, " must have 4 dimensions [batch, heads, length, dimension], has ",
          t.dim());
  return t.size(3) == 1 || t.stride(3) == 1 ? t : contiguous_copy(t);
}

HeadTensor head_tensor(const char* name, const Tensor& t) {
  return head_tensor(t, float_type("attention", name, t.scalar_type()), {t.stride(0), t.stride(1), t.stride(2), 1});
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  const AttentionShape s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3)};
  require(s.dimension % 16 == 0 && s.dimension >= 16 && s.dimension <= 128, "attention: the heads of q have dimension ",
          s.dimension,
          "; accepted are multiples of 16 up to 128; pad q, k and v with zeros, or use torch's "
          "scaled_dot_product_attention");
  require(k.size(0) == s.batch && k.size(3) == s.dimension, "attention: k has batch ", k.size(0), " and dimension ",
          k.size(3), ", q has ", s.batch, " and ", s.dimension);
  require(v.size(0) == s.batch && v.size(1) == s.kv_heads && v.size(2) == s.keys && v.size(3) == s.dimension,
          "attention: v must have the shape of k");
  require(s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0, "attention: q has ", s.heads, " heads and k ",
          s.kv_heads, "; both need at least 1, and the first must be a multiple of the second");
  return s;
}

// The strides of a mask that is broadcast to [batch, heads, queries, keys].
Strides mask_strides(const Tensor& mask, const AttentionShape& shape) {
  const Strides sizes{shape.batch, shape.heads, shape.queries, shape.keys};
  require(mask.dim() <= 4 && mask.dim() >= 1, "attention: mask must have 1 to 4 dimensions, has ", mask.dim());
  Strides strides{};
  const std::int64_t missing = 4 - mask.dim();
  for (std::int64_t d = missing; d < 4; ++d) {
    const std::int64_t size = mask.size(d - missing), needed = sizes[static_cast<std::size_t>(d)];
    require(size == needed || (size == 1 && d < 3), "attention: mask has size ", size,
            " where [batch, heads, queries, ", "keys] has ", needed,
            "; give a mask that can be broadcast, with all keys in its last dimension");
    strides[static_cast<std::size_t>(d)] = size == 1 ? 0 : mask.stride(d - missing);
  }
  return strides;
}

Tensor attention_op(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                    const std::optional<Tensor>& mask_any, bool causal, double scale, std::int64_t precision) {
  const Tensor q = with_dense_rows("q", q_any), k = with_dense_rows("k", k_any), v = with_dense_rows("v", v_any);
  require(precision >= 0 && precision <= 3,
          "attention: precision must be 0 (auto), 1 (float32), 2 (bfloat16) or 3 (int8), is ", precision);
  const AttentionShape shape = shape_of(q, k, v);
  AttentionTensors tensors{};
  tensors.q = head_tensor("q", q);
  tensors.k = head_tensor("k", k);
  tensors.v = head_tensor("v", v);
  std::optional<Tensor> mask = mask_any;
  if (mask) {
    const bool looks = mask->scalar_type() == ScalarType::Bool;
    tensors.mask_kind = looks ? MaskKind::look : MaskKind::add;
    const FloatType type = looks ? FloatType::f32 : float_type("attention", "mask", mask->scalar_type());
    if (mask->dim() > 0 && mask->size(-1) > 1 && mask->stride(-1) != 1) mask = contiguous_copy(*mask);
    tensors.mask = head_tensor(*mask, type, mask_strides(*mask, shape));
  }
  const Tensor out = empty({shape.batch, shape.queries, shape.heads * shape.dimension}, q.scalar_type());
  tensors.out = out.mutable_data_ptr();
  attention(shape, tensors, causal, static_cast<float>(scale), static_cast<Precision>(precision));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, int precision) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) { m.impl("attention", TORCH_BOX(&attention_op)); }

}  // namespace octavo
