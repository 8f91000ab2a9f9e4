// SPDX-License-Identifier: Apache-2.0
// The torch operators of weights that are 16-bit floats: schemas, argument checks, outputs. The packed weight is a tensor of
// the weight's own dtype, and so says which type it is.
#include <cstdint>
#include <optional>

#include "drivers/half/half_linear.h"
#include "drivers/half/half_pack.h"
#include "tensors.h"

namespace octavo {

namespace {

bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half; }

const std::uint16_t* halves(const Tensor& t) { return static_cast<const std::uint16_t*>(t.const_data_ptr()); }
std::uint16_t* mutable_halves(const Tensor& t) { return static_cast<std::uint16_t*>(t.mutable_data_ptr()); }

void check_not_negative(const char* op, const char* name, std::int64_t size) {
  require(size >= 0, op, ": ", name, " must not be negative, got ", size);
}

void check_packed_half(const char* op, const Tensor& packed, std::int64_t n, std::int64_t k) {
  require(is_half(packed) && packed.dim() == 3 && packed.size(0) == ceil_divide(n, kStripColumns) &&
              packed.size(1) == k && packed.size(2) == kStripColumns,
          op, ": packed does not hold a weight of ", n, " x ", k, "; need bfloat16 or float16 [",
          ceil_divide(n, kStripColumns), ", ", k, ", 16] as pack_half makes it");
}

// --- packing ---

void check_weight(const char* op, const Tensor& weight) {
  require(weight.dim() == 2, op, ": weight must have 2 dimensions [rows, columns], has ", weight.dim());
  require(is_half(weight), op, ": weight must be bfloat16 or float16");
}

void pack_into(const Tensor& weight, const Tensor& packed) {
  pack_half({halves(weight), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)},
            mutable_halves(packed));
}

Tensor pack_half_op(const Tensor& weight) {
  check_weight("pack_half", weight);
  const Tensor packed =
      empty({ceil_divide(weight.size(0), kStripColumns), weight.size(1), kStripColumns}, weight.scalar_type());
  pack_into(weight, packed);
  return packed;
}

void pack_half_into_op(const Tensor& weight, const Tensor& packed) {
  check_weight("pack_half_into", weight);
  check_packed_half("pack_half_into", packed, weight.size(0), weight.size(1));
  require(packed.scalar_type() == weight.scalar_type(), "pack_half_into: packed must have the dtype of weight");
  require(packed.is_contiguous(), "pack_half_into: packed must be contiguous");
  pack_into(weight, packed);
}

Tensor unpack_half_op(const Tensor& packed_any, std::int64_t n, std::int64_t k) {
  check_not_negative("unpack_half", "n", n);
  check_not_negative("unpack_half", "k", k);
  check_packed_half("unpack_half", packed_any, n, k);
  const Tensor packed = dense(packed_any);
  const Tensor weight = empty({n, k}, packed.scalar_type());
  unpack_half(halves(packed), n, k, mutable_halves(weight));
  return weight;
}

// --- the layers ---

Tensor embedding_half_op(const Tensor& ids_any, const Tensor& packed_any, std::int64_t n, ScalarType dtype) {
  const char* const op = "embedding_half";
  check_not_negative(op, "n", n);
  const FloatType type = float_type(op, "dtype", dtype);
  const std::int64_t k = packed_any.dim() == 3 ? packed_any.size(1) : 0;
  check_packed_half(op, packed_any, n, k);
  const IdsArgument ids(op, ids_any, n);
  const Tensor packed = dense(packed_any), out = ids.rows(k, dtype);
  embedding_half(halves(packed), k, float_type(op, "packed", packed.scalar_type()), ids.ids, out.mutable_data_ptr(),
                 type);
  return out;
}

Tensor linear_half_op(const Tensor& x_any, const Tensor& packed_any, const std::optional<Tensor>& bias_any,
                      std::int64_t n, std::int64_t activation) {
  const char* const op = "linear_half";
  const FloatType type = float_type(op, "x", x_any.scalar_type());
  require(x_any.dim() >= 1, op, ": x needs at least 1 dimension [..., k], has none");
  const std::int64_t k = x_any.size(x_any.dim() - 1);
  check_not_negative(op, "n", n);
  require(packed_any.dim() == 3 && packed_any.size(1) == k, op, ": x has ", k,
          " features, packed was made for another number of them");
  check_packed_half(op, packed_any, n, k);
  std::optional<FloatVector> bias;
  if (bias_any) bias.emplace(op, "bias", *bias_any, n);
  const Tensor x = dense(x_any), packed = dense(packed_any);
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor out = empty(sizes, x.scalar_type());
  linear_half({x.const_data_ptr(), type, rows_before(x, x.dim() - 1)},
              {halves(packed), float_type(op, "packed", packed.scalar_type()), bias ? bias->data() : nullptr, n, k},
              {out.mutable_data_ptr(), type, activation_of(op, activation)});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) {
  m.def("pack_half(Tensor weight) -> Tensor");
  m.def("pack_half_into(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("unpack_half(Tensor packed, int n, int k) -> Tensor");
  m.def("embedding_half(Tensor ids, Tensor packed, int n, ScalarType dtype) -> Tensor");
  m.def("linear_half(Tensor x, Tensor packed, Tensor? bias, int n, int activation=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("pack_half", TORCH_BOX(&pack_half_op));
  m.impl("pack_half_into", TORCH_BOX(&pack_half_into_op));
  m.impl("unpack_half", TORCH_BOX(&unpack_half_op));
  m.impl("embedding_half", TORCH_BOX(&embedding_half_op));
  m.impl("linear_half", TORCH_BOX(&linear_half_op));
}

}  // namespace octavo
