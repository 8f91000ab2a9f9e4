// SPDX-License-Identifier: Apache-2.0
// The torch operators on floats: schemas, argument checks, outputs.
#include "drivers/float_ops.h"

#include <cstdint>
#include <optional>
#include <tuple>

#include "drivers/tiles.h"
#include "tensors.h"

namespace octavo {

namespace {

Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

void check_like(const char* op, const char* name, const Tensor& t, const char* other, const Tensor& like) {
  require(t.scalar_type() == like.scalar_type() && sizes_of(t) == sizes_of(like), op, ": ", name,
          " must have the shape and the dtype of ", other);
}

// --- activations ---

Tensor activate_op(const Tensor& x_any, std::int64_t activation) {
  const FloatType type = float_type("activate", "x", x_any.scalar_type());
  const Tensor x = dense(x_any), out = empty(sizes_of(x_any), x_any.scalar_type());
  const std::int64_t count = x.numel();
  activate({activation_of("activate", activation), x.const_data_ptr(), count, type, 1, count, out.mutable_data_ptr(),
            count, type});
  return out;
}

Tensor silu_mul_op(const Tensor& gate_any, const Tensor& up_any) {
  const FloatType type = float_type("silu_mul", "gate", gate_any.scalar_type());
  require(gate_any.dim() >= 1, "silu_mul: gate needs at least 1 dimension, has none");
  check_like("silu_mul", "up", up_any, "gate", gate_any);
  const RowView gate(gate_any), up(up_any);
  const Tensor out = empty(sizes_of(gate_any), gate_any.scalar_type());
  if (out.numel() == 0) return out;  // of no columns there may be any number of rows
  silu_mul({gate.tensor.const_data_ptr(), gate.stride, up.tensor.const_data_ptr(), up.stride, type, gate.rows,
            gate.columns, out.mutable_data_ptr(), gate.columns});
  return out;
}

// --- norms ---

// The arguments of a norm, checked and contiguous, its outputs, and both of them in the form that the driver takes.
struct NormArguments {
  Tensor x;
  std::optional<Tensor> residual, sum;
  FloatType type;
  std::int64_t columns;
  FloatVector weight;
  std::optional<FloatVector> bias;
  Tensor y;

  NormArguments(const char* op, const Tensor& x_any, const std::optional<Tensor>& residual_any,
                const Tensor& weight_any, const std::optional<Tensor>& bias_any, bool keep_sum)
      : x(dense(x_any)),
        type(float_type(op, "x", x.scalar_type())),
        columns(columns_of(op, x)),
        weight(op, "weight", weight_any, columns),
        y(empty(sizes_of(x), x.scalar_type())) {
    if (bias_any) bias.emplace(op, "bias", *bias_any, columns);
    if (!residual_any) return;
    check_like(op, "residual", *residual_any, "x", x);
    residual = dense(*residual_any);
    sum = empty(keep_sum ? sizes_of(x) : Sizes{0}, x.scalar_type());
  }

  static std::int64_t columns_of(const char* op, const Tensor& x) {
    require(x.dim() >= 1, op, ": x needs at least 1 dimension [..., k], has none");
    return x.size(x.dim() - 1);
  }

  // A row without elements is a row: the next layer gives the bias for it.
  std::int64_t rows() const { return rows_before(x, x.dim() - 1); }

  Norm norm(double eps, bool rms) const {
    return {x.const_data_ptr(),
            residual ? residual->const_data_ptr() : nullptr,
            type,
            weight.data(),
            bias ? bias->data() : nullptr,
            static_cast<float>(eps),
            rms,
            columns,
            sum && sum->numel() ? sum->mutable_data_ptr() : nullptr,
            y.mutable_data_ptr()};
  }

  void run(double eps, bool rms) const {
    if (columns > 0) norm_rows(norm(eps, rms), rows());
  }
};

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps) {
  const NormArguments arguments("rms_norm", x, std::nullopt, weight, std::nullopt, false);
  arguments.run(eps, true);
  return arguments.y;
}

std::tuple<Tensor, Tensor> add_norm_op(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                       const std::optional<Tensor>& bias, double eps, bool rms, bool keep_sum) {
  const NormArguments arguments("add_norm", x, residual, weight, bias, keep_sum);
  arguments.run(eps, rms);
  return {arguments.y, *arguments.sum};
}

// Rows of codes lie as far apart as the driver of the linear layers lays rows of codes.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_codes_op(const Tensor& x, const Tensor& residual,
                                                             const Tensor& weight, const std::optional<Tensor>& bias,
                                                             double eps, bool rms, bool keep_sum) {
  const NormArguments arguments("add_norm_codes", x, residual, weight, bias, keep_sum);
  const std::int64_t stride = row_distance(arguments.columns);
  const Tensor codes = empty(sizes_of(x), ScalarType::Byte, stride);
  const Tensor scale = empty({arguments.rows()}, ScalarType::Float);
  norm_rows_to_codes(arguments.norm(eps, rms), arguments.rows(),
                     {mutable_data<std::uint8_t>(codes), stride, mutable_data<float>(scale)});
  return {arguments.y, *arguments.sum, codes, scale};
}

// --- rotary position embedding ---

Tensor rotated(const char* name, const Tensor& any, const Tensor& cos, const Tensor& sin) {
  require(any.dim() == 4, "rope: ", name, " must have 4 dimensions [batch, heads, length, columns], has ", any.dim());
  const FloatType type = float_type("rope", name, any.scalar_type()),
                  angle_type = float_type("rope", "cos", cos.scalar_type());
  const std::int64_t batch = any.size(0), length = any.size(2), columns = any.size(3), pairs = cos.size(2);
  require((cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == length && pairs <= columns && pairs % 2 == 0,
          "rope: cos must have the shape [1 or ", batch, ", ", length, ", at most ", columns, " and even] to fit ",
          name);
  const Tensor x = columns < 2 || any.stride(3) == 1 ? any : dense(any);
  const Tensor out = empty(sizes_of(any), any.scalar_type());
  if (out.numel() == 0) return out;
  rope({x.const_data_ptr(), type, batch, x.size(1), length, columns, x.stride(0), x.stride(1), x.stride(2),
        cos.const_data_ptr(), sin.const_data_ptr(), angle_type, cos.size(0) == 1 ? 0 : length * pairs, pairs,
        out.mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> rope_op(const Tensor& q, const Tensor& k, const Tensor& cos_any, const Tensor& sin_any) {
  require(cos_any.dim() == 3, "rope: cos must have 3 dimensions [1 or batch, length, columns], has ", cos_any.dim());
  check_like("rope", "sin", sin_any, "cos", cos_any);
  const Tensor cos = dense(cos_any), sin = dense(sin_any);
  return {rotated("q", q, cos, sin), rotated("k", k, cos, sin)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) {
  m.def("activate(Tensor x, int activation) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool rms=False, bool keep_sum=True) "
      "-> "
      "(Tensor y, Tensor sum)");
  m.def(
      "add_norm_codes(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool rms=False, bool "
      "keep_sum=True) -> "
      "(Tensor y, Tensor sum, Tensor codes, Tensor scale)");
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q_rotated, Tensor k_rotated)");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("activate", TORCH_BOX(&activate_op));
  m.impl("silu_mul", TORCH_BOX(&silu_mul_op));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("add_norm", TORCH_BOX(&add_norm_op));
  m.impl("add_norm_codes", TORCH_BOX(&add_norm_codes_op));
  m.impl("rope", TORCH_BOX(&rope_op));
}

}  // namespace octavo
