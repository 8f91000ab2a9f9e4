// SPDX-License-Identifier: Apache-2.0
// The torch operators on codes: schemas, argument checks, outputs. linear.cpp has the operators of the linear layers.
#include <cstdint>
#include <tuple>

#include "drivers/linear.h"
#include "drivers/pack.h"
#include "drivers/quantize.h"
#include "drivers/saturating.h"
#include "tensors.h"

namespace octavo {

namespace {

Rows rows_of(const char* op, const char* name, const Tensor& t) {
  require(t.dim() == 2, op, ": ", name, " must have 2 dimensions [rows, columns], has ", t.dim());
  return {t.size(0), t.size(1)};
}

void check_qparams(const char* op, const Tensor& scale, const Tensor& zero_point, std::int64_t rows) {
  require(scale.scalar_type() == ScalarType::Float && scale.dim() == 1 && scale.size(0) == rows, op,
          ": scale must be float32 with one value for each of the ", rows, " rows");
  require(zero_point.scalar_type() == ScalarType::Int && zero_point.dim() == 1 && zero_point.size(0) == rows, op,
          ": zero_point must be int32 with one value for each of the ", rows, " rows");
}

// --- quantize and dequantize ---

std::tuple<Tensor, Tensor> choose_qparams_op(const Tensor& x_any, std::int64_t qmin, std::int64_t qmax,
                                             bool symmetric) {
  const Rows shape = rows_of("choose_qparams", "x", x_any);
  const FloatType type = float_type("choose_qparams", "x", x_any.scalar_type());
  check_qparams_range(qmin, qmax, symmetric);
  const Tensor x = dense(x_any);
  const Tensor scale = empty({shape.rows}, ScalarType::Float), zero_point = empty({shape.rows}, ScalarType::Int);
  const CodeRange range{static_cast<std::int32_t>(qmin), static_cast<std::int32_t>(qmax)};
  choose_qparams(x.const_data_ptr(), type, shape, range, symmetric, mutable_data<float>(scale),
                 mutable_data<std::int32_t>(zero_point));
  return {scale, zero_point};
}

Tensor quantize_op(const Tensor& x_any, const Tensor& scale_any, const Tensor& zero_point_any, std::int64_t qmin,
                   std::int64_t qmax, ScalarType dtype) {
  const Rows shape = rows_of("quantize", "x", x_any);
  const FloatType type = float_type("quantize", "x", x_any.scalar_type());
  require(is_code(dtype), "quantize: dtype must be int8 or uint8");
  const bool is_signed = dtype == ScalarType::Char;
  check_code_range("quantize", qmin, qmax, is_signed ? -128 : 0, is_signed ? 127 : 255);
  check_qparams("quantize", scale_any, zero_point_any, shape.rows);
  const Tensor x = dense(x_any), scale = dense(scale_any), zero_point = dense(zero_point_any);
  const Tensor codes = empty({shape.rows, shape.columns}, dtype);
  const CodeRange range{static_cast<std::int32_t>(qmin), static_cast<std::int32_t>(qmax)};
  quantize(x.const_data_ptr(), type, shape, range, data<float>(scale), data<std::int32_t>(zero_point),
           mutable_data<std::uint8_t>(codes));
  return codes;
}

Tensor dequantize_op(const Tensor& codes_any, const Tensor& scale_any, const Tensor& zero_point_any, ScalarType dtype) {
  const Rows shape = rows_of("dequantize", "codes", codes_any);
  require(is_code(codes_any.scalar_type()), "dequantize: codes must be int8 or uint8");
  const FloatType type = float_type("dequantize", "dtype", dtype);
  check_qparams("dequantize", scale_any, zero_point_any, shape.rows);
  const Tensor codes = dense(codes_any), scale = dense(scale_any), zero_point = dense(zero_point_any);
  const Tensor out = empty({shape.rows, shape.columns}, dtype);
  dequantize(data<std::uint8_t>(codes), codes.scalar_type() == ScalarType::Char, shape, data<float>(scale),
             data<std::int32_t>(zero_point), out.mutable_data_ptr(), type);
  return out;
}

// --- integer products and packing ---

Tensor int8_mm_op(const Tensor& a_any, const Tensor& b_any) {
  const Rows a_shape = rows_of("int8_mm", "a", a_any), b_shape = rows_of("int8_mm", "b", b_any);
  require(is_code(a_any.scalar_type()), "int8_mm: a must be int8 or uint8");
  require(b_any.scalar_type() == ScalarType::Char, "int8_mm: b must be int8");
  require(a_shape.columns == b_shape.rows, "int8_mm: a has ", a_shape.columns, " columns, b has ", b_shape.rows,
          " rows; they must be equal");
  const Tensor a = dense(a_any), b = dense(b_any);
  const Tensor c = empty({a_shape.rows, b_shape.columns}, ScalarType::Int);
  int8_mm({a.const_data_ptr(), a.scalar_type() == ScalarType::Char, data<std::int8_t>(b), a_shape.rows, b_shape.columns,
           a_shape.columns, mutable_data<std::int32_t>(c)});
  return c;
}

// Fills `packed` and returns column_sum.
Tensor pack_into(const char* op, const Tensor& codes, const Tensor& packed) {
  const Rows shape = rows_of(op, "codes", codes);
  require(codes.scalar_type() == ScalarType::Char, op, ": codes must be int8");
  check_packed(op, packed, shape.rows, shape.columns);
  require(packed.is_contiguous(), op, ": packed must be contiguous");
  const Tensor column_sum = empty({shape.rows}, ScalarType::Int);
  pack_weight(data<std::int8_t>(codes), shape.rows, shape.columns, codes.stride(0), codes.stride(1),
              mutable_data<std::int8_t>(packed), mutable_data<std::int32_t>(column_sum));
  return column_sum;
}

Tensor pack_weight_into_op(const Tensor& codes, const Tensor& packed) {
  return pack_into("pack_weight_into", codes, packed);
}

std::tuple<Tensor, Tensor> pack_weight_op(const Tensor& codes) {
  const Rows shape = rows_of("pack_weight", "codes", codes);
  const Tensor packed = empty(
      {ceil_divide(shape.rows, kStripColumns), ceil_divide(shape.columns, kTileK), kTileBytes / kLineBytes, kLineBytes},
      ScalarType::Char);
  return {packed, pack_into("pack_weight", codes, packed)};
}

// column_sum, and behind it the list of the saturating words, if there is one.
Tensor list_saturating_op(const Tensor& packed_any, const Tensor& column_sum_any) {
  require(column_sum_any.scalar_type() == ScalarType::Int && column_sum_any.dim() == 1,
          "list_saturating: column_sum must be int32 [n]");
  require(packed_any.dim() == 4,
          "list_saturating: packed must be int8 [strips, tiles, 16, 64] as pack_weight makes it");
  const std::int64_t n = column_sum_any.size(0), k = packed_any.size(1) * kTileK;
  check_packed("list_saturating", packed_any, n, k);
  const Tensor packed = dense(packed_any), column_sum = dense(column_sum_any);
  const std::vector<std::int32_t> list = useful_list(data<std::int8_t>(packed), n, k);
  const Tensor out = empty({n + static_cast<std::int64_t>(list.size())}, ScalarType::Int);
  std::copy_n(data<std::int32_t>(column_sum), n, mutable_data<std::int32_t>(out));
  std::copy(list.begin(), list.end(), mutable_data<std::int32_t>(out) + n);
  return out;
}

Tensor unpack_weight_op(const Tensor& packed_any, std::int64_t n, std::int64_t k) {
  require(n >= 0 && k >= 0, "unpack_weight: n and k must not be negative, got ", n, " and ", k);
  check_packed("unpack_weight", packed_any, n, k);
  const Tensor packed = dense(packed_any);
  const Tensor codes = empty({n, k}, ScalarType::Char);
  unpack_weight(data<std::int8_t>(packed), n, k, mutable_data<std::int8_t>(codes));
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY(octavo, m) {
  m.def("choose_qparams(Tensor x, int qmin, int qmax, bool symmetric) -> (Tensor scale, Tensor zero_point)");
  m.def("quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor");
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("pack_weight(Tensor codes) -> (Tensor packed, Tensor column_sum)");
  m.def("pack_weight_into(Tensor codes, Tensor(a!) packed) -> Tensor column_sum");
  m.def("list_saturating(Tensor packed, Tensor column_sum) -> Tensor");
  m.def("unpack_weight(Tensor packed, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams_op));
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("int8_mm", TORCH_BOX(&int8_mm_op));
  m.impl("pack_weight", TORCH_BOX(&pack_weight_op));
  m.impl("pack_weight_into", TORCH_BOX(&pack_weight_into_op));
  m.impl("list_saturating", TORCH_BOX(&list_saturating_op));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_op));
}

}  // namespace octavo
