// SPDX-License-Identifier: Apache-2.0
// The torch operators of the linear layers: schemas, argument checks, outputs. No autograd is registered here, because it would
// cost 2.9 us in each call: python/octavo/ops branches to it where a gradient is needed.
#include "drivers/linear.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "drivers/saturating.h"
#include "tensors.h"

namespace octavo {

namespace {

// The weight of a linear operator with k features, checked and contiguous.
struct WeightArguments {
  Tensor packed, column_sum, weight_scale;
  std::optional<FloatVector> bias;
  std::int64_t n, k;
  SaturatingWords words;

  WeightArguments(const char* op, std::int64_t k_, const Tensor& packed_any, const Tensor& column_sum_any,
                  const Tensor& weight_scale_any, const std::optional<Tensor>& bias_any)
      : packed(packed_any), column_sum(column_sum_any), weight_scale(weight_scale_any), k(k_) {
    require(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 2 && weight_scale.size(1) == 1, op,
            ": weight_scale must be float32 [n, 1]");
    n = weight_scale.size(0);
    require(packed.dim() == 4 && packed.size(1) == ceil_divide(k, kTileK), op, ": x has ", k,
            " features, packed was made for another number of them");
    check_packed(op, packed, n, k);
    require(column_sum.scalar_type() == ScalarType::Int && column_sum.dim() == 1 && column_sum.size(0) >= n, op,
            ": column_sum must be int32 with ", n, " values");
    if (bias_any) bias.emplace(op, "bias", *bias_any, n);
    packed = dense(packed);
    column_sum = dense(column_sum);
    weight_scale = dense(weight_scale);
    words = words_in(op, data<std::int32_t>(column_sum) + n, column_sum.size(0) - n, n);
  }

  PackedWeight weight() const {
    return {data<std::int8_t>(packed),
            data<std::int32_t>(column_sum),
            data<float>(weight_scale),
            bias ? bias->data() : nullptr,
            n,
            k,
            nullptr,
            words};
  }
};

std::int64_t features_of(const char* op, const char* name, const Tensor& x) {
  require(x.dim() >= 1, op, ": ", name, " needs at least 1 dimension [..., k], has none");
  return x.size(x.dim() - 1);
}

// An output [..., n] for x [..., k].
Tensor make_output(const Tensor& x, std::int64_t n, ScalarType dtype) {
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return empty(sizes, dtype);
}

// x and the weight of a linear operator, checked and contiguous, and the operator's output.
struct LinearArguments {
  FloatType type;
  WeightArguments weight;
  Tensor x, out;

  LinearArguments(const char* op, const Tensor& x_any, const Tensor& packed, const Tensor& column_sum,
                  const Tensor& weight_scale, const std::optional<Tensor>& bias)
      : type(float_type(op, "x", x_any.scalar_type())),
        weight(op, features_of(op, "x", x_any), packed, column_sum, weight_scale, bias),
        x(dense(x_any)),
        out(make_output(x, weight.n, x.scalar_type())) {}

  Activations activations() const { return {x.const_data_ptr(), type, rows_before(x, x.dim() - 1)}; }

  Output output(const char* op, std::int64_t activation) const {
    return {out.mutable_data_ptr(), type, activation_of(op, activation)};
  }
};

Tensor linear_dynamic_op(const Tensor& x, const Tensor& packed, const Tensor& column_sum, const Tensor& weight_scale,
                         const std::optional<Tensor>& bias, bool symmetric, std::int64_t activation) {
  const LinearArguments arguments("linear_dynamic", x, packed, column_sum, weight_scale, bias);
  linear_dynamic(arguments.activations(), arguments.weight.weight(), symmetric,
                 arguments.output("linear_dynamic", activation));
  return arguments.out;
}

Tensor linear_static_op(const Tensor& x, const Tensor& packed, const Tensor& column_sum, const Tensor& weight_scale,
                        const std::optional<Tensor>& bias, const Tensor& input_scale, const Tensor& input_zero_point,
                        std::int64_t activation) {
  const bool is_integer = bias && bias->scalar_type() == ScalarType::Int;  // the other operators refuse such a bias
  const std::optional<Tensor> integer_bias = is_integer ? std::optional(dense(*bias)) : std::nullopt;
  const LinearArguments arguments("linear_static", x, packed, column_sum, weight_scale,
                                  is_integer ? std::nullopt : bias);
  PackedWeight weight = arguments.weight.weight();
  if (integer_bias) {
    require(integer_bias->dim() == 1 && integer_bias->size(0) == weight.n, "linear_static: bias must have ", weight.n,
            " values");
    weight.integer_bias = data<std::int32_t>(*integer_bias);
  }
  require(input_scale.scalar_type() == ScalarType::Float && input_scale.numel() == 1,
          "linear_static: input_scale must be float32 with 1 value");
  require(input_zero_point.scalar_type() == ScalarType::Int && input_zero_point.numel() == 1,
          "linear_static: input_zero_point must be int32 with 1 value");
  const RowQParams input{*data<float>(input_scale), *data<std::int32_t>(input_zero_point)};
  require(input.scale >= std::numeric_limits<float>::min() && std::isfinite(input.scale),
          "linear_static: input_scale must be a positive normal number, is ", input.scale);
  require(input.zero_point >= -128 && input.zero_point <= 127,
          "linear_static: input_zero_point must be in -128 .. 127, is ", input.zero_point);
  linear_static(arguments.activations(), weight, input, arguments.output("linear_static", activation));
  return arguments.out;
}

Tensor linear_weight_only_op(const Tensor& x, const Tensor& packed, const Tensor& column_sum,
                             const Tensor& weight_scale, const std::optional<Tensor>& bias, std::int64_t activation) {
  const LinearArguments arguments("linear_weight_only", x, packed, column_sum, weight_scale, bias);
  linear_weight_only(arguments.activations(), arguments.weight.weight(),
                     arguments.output("linear_weight_only", activation));
  return arguments.out;
}

Tensor linear_codes_op(const Tensor& codes, const Tensor& scale_any, const Tensor& packed, const Tensor& column_sum,
                       const Tensor& weight_scale, const std::optional<Tensor>& bias, std::int64_t activation) {
  require(codes.scalar_type() == ScalarType::Byte, "linear_codes: codes must be uint8");
  const WeightArguments weight("linear_codes", features_of("linear_codes", "codes", codes), packed, column_sum,
                               weight_scale, bias);
  const RowView rows(codes);
  require(scale_any.scalar_type() == ScalarType::Float && scale_any.dim() == 1 && scale_any.size(0) == rows.rows,
          "linear_codes: scale must be float32 with one value for each of the ", rows.rows, " rows");
  const Tensor scale = dense(scale_any);
  const Tensor out = make_output(codes, weight.n, ScalarType::Float);
  linear_codes({data<std::uint8_t>(rows.tensor), rows.stride, data<float>(scale), rows.rows}, weight.weight(),
               {out.mutable_data_ptr(), FloatType::f32, activation_of("linear_codes", activation)});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) {
  m.def(
      "linear_dynamic(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias, "
      "bool symmetric, int activation=0) -> Tensor");
  m.def(
      "linear_static(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias, "
      "Tensor input_scale, Tensor input_zero_point, int activation=0) -> Tensor");
  m.def(
      "linear_weight_only(Tensor x, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias, "
      "int activation=0) -> Tensor");
  m.def(
      "linear_codes(Tensor codes, Tensor scale, Tensor packed, Tensor column_sum, Tensor weight_scale, Tensor? bias, "
      "int activation=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic_op));
  m.impl("linear_static", TORCH_BOX(&linear_static_op));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only_op));
  m.impl("linear_codes", TORCH_BOX(&linear_codes_op));
}

}  // namespace octavo
