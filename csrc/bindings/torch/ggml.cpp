// SPDX-License-Identifier: Apache-2.0
// The torch operators of GGML's blocks: schemas, argument checks, outputs. A type is its number in files.
#include "drivers/ggml/ggml.h"

#include <cstdint>
#include <optional>
#include <tuple>

#include "drivers/groups/planes.h"
#include "tensors.h"

namespace octavo {

namespace {

void check_k(const char* op, const BlockForm& form, std::int64_t k) {
  require(k >= 0 && k % form.elements == 0, op, ": k must be a whole number of blocks, which for ", form.name, " have ",
          form.elements, " elements; it is ", k);
}

void check_blocks(const char* op, const Tensor& blocks, const BlockMatrix& shape) {
  require(blocks.dim() == 2 && blocks.scalar_type() == ScalarType::Byte && blocks.size(1) == shape.row_bytes(), op,
          ": blocks must be uint8 [n, ", shape.row_bytes(), "] for ", shape.form.name, " and k = ", shape.k);
}

Tensor ggml_quantize_op(const Tensor& x_any, std::int64_t type, const std::optional<Tensor>& importance_any) {
  const char* const op = "ggml_quantize";
  const BlockForm& form = block_form(op, type);
  const FloatType float_type_of_x = float_type(op, "x", x_any.scalar_type());
  require(x_any.dim() == 2, op, ": x must have 2 dimensions [n, k], has ", x_any.dim());
  const BlockMatrix shape{form, x_any.size(0), x_any.size(1)};
  check_k(op, form, shape.k);
  std::optional<FloatVector> importance;
  if (importance_any) importance.emplace(op, "importance", *importance_any, shape.k);
  const Tensor x = dense(x_any), blocks = empty({shape.n, shape.row_bytes()}, ScalarType::Byte);
  encode_blocks(shape, x.const_data_ptr(), float_type_of_x, importance ? importance->data() : nullptr,
                mutable_data<std::uint8_t>(blocks));
  return blocks;
}

Tensor ggml_dequantize_op(const Tensor& blocks_any, std::int64_t type, std::int64_t k, ScalarType dtype) {
  const char* const op = "ggml_dequantize";
  const BlockForm& form = block_form(op, type);
  const FloatType out_type = float_type(op, "dtype", dtype);
  check_k(op, form, k);
  const BlockMatrix shape{form, blocks_any.dim() ? blocks_any.size(0) : 0, k};
  check_blocks(op, blocks_any, shape);
  const Tensor blocks = dense(blocks_any), out = empty({shape.n, k}, dtype);
  decode_blocks(shape, data<std::uint8_t>(blocks), out.mutable_data_ptr(), out_type);
  return out;
}

// The shapes of the packed tensors; those that a type does not have are empty.
struct PackedShapes {
  Sizes codes, scale, super, minimum;

  explicit PackedShapes(const BlockMatrix& shape) {
    const BlockForm& form = shape.form;
    const std::int64_t strips = ceil_divide(shape.n, kStripColumns);
    codes = {strips, plane_blocks(shape.k), form.bits, kLineBytes};
    if (form.bits == 8) codes = {strips, ceil_divide(shape.k, kTileK), kTileBytes / kLineBytes, kLineBytes};
    const std::int64_t bytes = form.has_scale_bytes() ? 1 : 2;
    scale = {strips, shape.groups(), kStripColumns * bytes};
    super = minimum = {0};
    if (form.two_levels) super = {strips, shape.row_blocks(), form.has_minimum() ? 2 : 1, 2 * kStripColumns};
    if (form.has_minimum() && form.minimum != Number::high4) minimum = scale;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> ggml_pack_op(const Tensor& blocks_any, std::int64_t type, std::int64_t k) {
  const char* const op = "ggml_pack";
  const BlockForm& form = block_form(op, type);
  check_k(op, form, k);
  const BlockMatrix shape{form, blocks_any.dim() ? blocks_any.size(0) : 0, k};
  check_blocks(op, blocks_any, shape);
  const Tensor blocks = dense(blocks_any);
  const PackedShapes sizes(shape);
  const auto make = [](const Sizes& size) { return empty(size, ScalarType::Byte); };
  const Tensor codes = make(sizes.codes), scale = make(sizes.scale), super = make(sizes.super),
               minimum = make(sizes.minimum);
  for (const Tensor& each : {scale, super, minimum})
    std::memset(each.mutable_data_ptr(), 0, static_cast<std::size_t>(each.numel()));
  pack_blocks(shape, data<std::uint8_t>(blocks),
              {mutable_data<std::uint8_t>(codes), scale.mutable_data_ptr(),
               super.numel() ? mutable_data<std::uint16_t>(super) : nullptr,
               minimum.numel() ? minimum.mutable_data_ptr() : nullptr});
  return {codes, scale, super, minimum};
}

void check_bytes(const char* op, const char* name, const Tensor& t, const Sizes& sizes) {
  bool fits = t.scalar_type() == ScalarType::Byte && t.dim() == static_cast<std::int64_t>(sizes.size());
  for (std::size_t d = 0; fits && d < sizes.size(); ++d) fits = t.size(static_cast<std::int64_t>(d)) == sizes[d];
  require(fits, op, ": ", name, " must be uint8 [", joined(sizes), "] as ggml_pack makes it");
}

Tensor ggml_unpack_op(const Tensor& codes_any, const Tensor& scale_any, const Tensor& super_any,
                      const Tensor& minimum_any, std::int64_t type, std::int64_t n, std::int64_t k) {
  const char* const op = "ggml_unpack";
  const BlockForm& form = block_form(op, type);
  require(n >= 0, op, ": n must not be negative, is ", n);
  check_k(op, form, k);
  const BlockMatrix shape{form, n, k};
  const PackedShapes sizes(shape);
  check_bytes(op, "codes", codes_any, sizes.codes);
  check_bytes(op, "scale", scale_any, sizes.scale);
  check_bytes(op, "super_scale", super_any, sizes.super);
  check_bytes(op, "minimum", minimum_any, sizes.minimum);
  const Tensor codes = dense(codes_any), scale = dense(scale_any), super = dense(super_any),
               minimum = dense(minimum_any), blocks = empty({n, shape.row_bytes()}, ScalarType::Byte);
  // unpack_blocks writes to none of them.
  const auto bytes = [](const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
  unpack_blocks(
      shape,
      {static_cast<std::uint8_t*>(bytes(codes)), bytes(scale),
       super.numel() ? static_cast<std::uint16_t*>(bytes(super)) : nullptr, minimum.numel() ? bytes(minimum) : nullptr},
      mutable_data<std::uint8_t>(blocks));
  return blocks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) {
  m.def("ggml_quantize(Tensor x, int type, Tensor? importance=None) -> Tensor");
  m.def("ggml_dequantize(Tensor blocks, int type, int k, ScalarType dtype) -> Tensor");
  m.def("ggml_pack(Tensor blocks, int type, int k) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ggml_unpack(Tensor codes, Tensor scale, Tensor super_scale, Tensor minimum, int type, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("ggml_quantize", TORCH_BOX(&ggml_quantize_op));
  m.impl("ggml_dequantize", TORCH_BOX(&ggml_dequantize_op));
  m.impl("ggml_pack", TORCH_BOX(&ggml_pack_op));
  m.impl("ggml_unpack", TORCH_BOX(&ggml_unpack_op));
}

}  // namespace octavo
