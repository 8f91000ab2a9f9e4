// SPDX-License-Identifier: Apache-2.0
// The torch face of codes and linear layers: schemas, argument checks, outputs. Autograd is not registered here but
// branched to in ops/ (2.9 us a call).
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../linear.h"
#include "../pack.h"
#include "../quantize.h"
#include "torch_tensors.h"

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

void check_packed(const char* op, const Tensor& packed, std::int64_t n, std::int64_t k) {
  require(packed.scalar_type() == ScalarType::Char && packed.dim() == 4 &&
              packed.size(0) == ceil_divide(n, kStripColumns) && packed.size(1) == ceil_divide(k, kTileK) &&
              packed.size(2) == kTileBytes / kLineBytes && packed.size(3) == kLineBytes,
          op, ": packed does not hold a weight of ", n, " x ", k, "; need int8 [", ceil_divide(n, kStripColumns), ", ",
          ceil_divide(k, kTileK), ", 16, 64] as pack_weight makes it");
}

// Fills `packed`; returns column_sum.
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

Tensor unpack_weight_op(const Tensor& packed_any, std::int64_t n, std::int64_t k) {
  require(n >= 0 && k >= 0, "unpack_weight: n and k must not be negative, got ", n, " and ", k);
  check_packed("unpack_weight", packed_any, n, k);
  const Tensor packed = dense(packed_any);
  const Tensor codes = empty({n, k}, ScalarType::Char);
  unpack_weight(data<std::int8_t>(packed), n, k, mutable_data<std::int8_t>(codes));
  return codes;
}

// --- linear layers ---

// The arguments of a linear operator, checked and dense; `scratch` owns a bias that had to be widened.
struct LinearArguments {
  Tensor x, packed, column_sum, weight_scale;
  std::optional<Tensor> bias;
  std::vector<float> scratch;
  FloatType type;
  std::int64_t n, k;

  LinearArguments(const char* op, const Tensor& x_any, const Tensor& packed_any, const Tensor& column_sum_any,
                  const Tensor& weight_scale_any, const std::optional<Tensor>& bias_any)
      : x(x_any), packed(packed_any), column_sum(column_sum_any), weight_scale(weight_scale_any), bias(bias_any) {
    type = float_type(op, "x", x.scalar_type());
    require(x.dim() >= 1, op, ": x needs at least 1 dimension [..., k], has none");
    require(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 2 && weight_scale.size(1) == 1, op,
            ": weight_scale must be float32 [n, 1]");
    n = weight_scale.size(0);
    k = x.size(x.dim() - 1);
    require(packed.dim() == 4 && packed.size(1) == ceil_divide(k, kTileK), op, ": x has ", k,
            " features, packed was made for another number of them");
    check_packed(op, packed, n, k);
    require(column_sum.scalar_type() == ScalarType::Int && column_sum.dim() == 1 && column_sum.size(0) == n, op,
            ": column_sum must be int32 with ", n, " values");
    require(!bias || (bias->dim() == 1 && bias->size(0) == n), op, ": bias must have ", n, " values");
    x = dense(x);
    packed = dense(packed);
    column_sum = dense(column_sum);
    weight_scale = dense(weight_scale);
    if (bias) bias = dense(*bias);
  }

  const float* bias_as_float(const char* op) {
    if (!bias) return nullptr;
    const FloatType from = float_type(op, "bias", bias->scalar_type());
    if (from == FloatType::f32) return data<float>(*bias);
    scratch.resize(static_cast<std::size_t>(n));
    if (from == FloatType::bf16) {
      std::copy_n(data<torch::headeronly::BFloat16>(*bias), n, scratch.begin());
    } else {
      std::copy_n(data<torch::headeronly::Half>(*bias), n, scratch.begin());
    }
    return scratch.data();
  }

  Tensor make_output() const {
    Sizes sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = n;
    return empty(sizes, x.scalar_type());
  }

  Activations activations() const {
    std::int64_t m = 1;
    for (std::int64_t d = 0; d + 1 < x.dim(); ++d) m *= x.size(d);
    return {x.const_data_ptr(), type, m};
  }

  PackedWeight weight(const char* op) {
    return {
        data<std::int8_t>(packed), data<std::int32_t>(column_sum), data<float>(weight_scale), bias_as_float(op), n, k};
  }
};

Tensor linear_dynamic_op(const Tensor& x, const Tensor& packed, const Tensor& column_sum, const Tensor& weight_scale,
                         const std::optional<Tensor>& bias, bool symmetric) {
  LinearArguments arguments("linear_dynamic", x, packed, column_sum, weight_scale, bias);
  const PackedWeight weight = arguments.weight("linear_dynamic");
  const Tensor out = arguments.make_output();
  linear_dynamic(arguments.activations(), weight, symmetric, out.mutable_data_ptr());
  return out;
}

Tensor linear_static_op(const Tensor& x, const Tensor& packed, const Tensor& column_sum, const Tensor& weight_scale,
                        const std::optional<Tensor>& bias, const Tensor& input_scale, const Tensor& input_zero_point) {
  LinearArguments arguments("linear_static", x, packed, column_sum, weight_scale, bias);
  require(input_scale.scalar_type() == ScalarType::Float && input_scale.numel() == 1,
          "linear_static: input_scale must be float32 with 1 value");
  require(input_zero_point.scalar_type() == ScalarType::Int && input_zero_point.numel() == 1,
          "linear_static: input_zero_point must be int32 with 1 value");
  const RowQParams input{*data<float>(input_scale), *data<std::int32_t>(input_zero_point)};
  require(input.scale >= std::numeric_limits<float>::min() && std::isfinite(input.scale),
          "linear_static: input_scale must be a positive normal number, is ", input.scale);
  require(input.zero_point >= -128 && input.zero_point <= 127,
          "linear_static: input_zero_point must be in -128 .. 127, is ", input.zero_point);
  const PackedWeight weight = arguments.weight("linear_static");
  const Tensor out = arguments.make_output();
  linear_static(arguments.activations(), weight, input, out.mutable_data_ptr());
  return out;
}

Tensor linear_weight_only_op(const Tensor& x, const Tensor& packed, const Tensor& column_sum,
                             const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  LinearArguments arguments("linear_weight_only", x, packed, column_sum, weight_scale, bias);
  const PackedWeight weight = arguments.weight("linear_weight_only");
  const Tensor out = arguments.make_output();
  linear_weight_only(arguments.activations(), weight, out.mutable_data_ptr());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(octavo, m) {
  m.def("choose_qparams(Tensor x, int qmin, int qmax, bool symmetric) -> (Tensor scale, Tensor zero_point)");
  m.def("quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor");
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("pack_weight(Tensor codes) -> (Tensor packed, Tensor column_sum)");
  m.def("pack_weight_into(Tensor codes, Tensor(a!) packed) -> Tensor column_sum");
  m.def("unpack_weight(Tensor packed, int n, int k) -> Tensor");
  m.def(
      "linear_dynamic(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias, "
      "bool symmetric) -> Tensor");
  m.def(
      "linear_static(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias, "
      "Tensor input_scale, Tensor input_zero_point) -> Tensor");
  m.def(
      "linear_weight_only(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams_op));
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("int8_mm", TORCH_BOX(&int8_mm_op));
  m.impl("pack_weight", TORCH_BOX(&pack_weight_op));
  m.impl("pack_weight_into", TORCH_BOX(&pack_weight_into_op));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_op));
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic_op));
  m.impl("linear_static", TORCH_BOX(&linear_static_op));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only_op));
}

}  // namespace octavo
