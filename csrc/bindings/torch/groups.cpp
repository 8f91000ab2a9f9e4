// SPDX-License-Identifier: Apache-2.0
// The torch operators of weights in groups: schemas, argument checks, outputs.
#include <cstdint>
#include <optional>

#include "drivers/groups/group_linear.h"
#include "drivers/groups/group_values.h"
#include "drivers/groups/planes.h"
#include "tensors.h"

namespace octavo {

namespace {

Number number_of(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Number::f32;
    case ScalarType::BFloat16: return Number::bf16;
    case ScalarType::Half: return Number::f16;
    case ScalarType::Byte: return Number::u8;
    case ScalarType::Char: return Number::s8;
    case ScalarType::Float8_e4m3fn: return Number::e4m3;
    default: require(false, op, ": ", name, " must be float32, bfloat16, float16, uint8, int8 or float8_e4m3fn");
  }
  return Number::none;
}

void check_bits(const char* op, std::int64_t bits) {
  require(bits >= 1 && bits <= 7, op, ": bits must be in 1 .. 7, is ", bits,
          "; codes of 8 bits are packed by pack_weight");
}

void check_planes(const char* op, const char* name, const Tensor& planes, std::int64_t n, std::int64_t k,
                  std::int64_t bits) {
  require(planes.scalar_type() == ScalarType::Byte && planes.dim() == 4 &&
              planes.size(0) == ceil_divide(n, kStripColumns) && planes.size(1) == plane_blocks(k) &&
              planes.size(2) == bits && planes.size(3) == kLineBytes,
          op, ": ", name, " does not hold a weight of ", n, " x ", k, " with ", bits, " bits; need uint8 [",
          ceil_divide(n, kStripColumns), ", ", plane_blocks(k), ", ", bits, ", 64] as pack_planes makes it");
}

// The weight arguments of an operator, checked and contiguous.
struct GroupArguments {
  Tensor codes;
  std::optional<Tensor> scale, super, minimum, table, column_scale;
  std::optional<FloatVector> bias;
  std::int64_t groups;
  GroupWeight weight{};

  GroupArguments(const char* op, std::int64_t k, const Tensor& codes_any, const std::optional<Tensor>& scale_any,
                 const std::optional<Tensor>& super_any, const std::optional<Tensor>& minimum_any,
                 const std::optional<Tensor>& table_any, const std::optional<Tensor>& column_scale_any,
                 const std::optional<Tensor>& bias_any, std::int64_t n, std::int64_t bits, std::int64_t group_size,
                 std::int64_t offset)
      : codes(dense(codes_any)) {
    require(n >= 0, op, ": n must not be negative, is ", n);
    require(bits >= 1 && bits <= 8, op, ": bits must be in 1 .. 8, is ", bits);
    require(group_size >= 0 && group_size % kUnitK == 0, op,
            ": group_size must be a multiple of 16, or 0 for one group, is ", group_size);
    require(offset >= 0 && offset <= 255, op, ": offset must be in 0 .. 255, is ", offset);
    if (bits == 8) {
      check_packed(op, codes, n, k);
    } else {
      check_planes(op, "codes", codes, n, k, bits);
    }
    groups = group_size ? ceil_divide(k, group_size) : 1;
    weight.n = n;
    weight.k = k;
    weight.group_size =
        group_size >= k ? 0 : group_size;  // one group: then segments may be as long as the input allows
    weight.offset = static_cast<std::int32_t>(offset);
    weight.codes = {static_cast<const std::uint8_t*>(codes.const_data_ptr()),
                    static_cast<std::ptrdiff_t>(bits == 8 ? ceil_divide(k, kTileK) * kTileBytes
                                                          : strip_bytes_of_planes(k, static_cast<int>(bits))),
                    static_cast<int>(bits), nullptr, false};
    GroupScales& scales = weight.scales;
    scales.groups = groups;
    take_numbers(op, "scale", scale_any, scale, scales.scale, scales.scale_type);
    take_numbers(op, "minimum", minimum_any, minimum, scales.minimum, scales.minimum_type);
    take_super(op, super_any);
    check_numbers(op);
    take_table(op, table_any, bits);
    if (column_scale_any) {
      column_scale = dense(*column_scale_any);
      require(
          column_scale->scalar_type() == ScalarType::Float && column_scale->dim() == 1 && column_scale->size(0) == n,
          op, ": column_scale must be float32 with ", n, " values");
      weight.column_scale = data<float>(*column_scale);
    }
    if (bias_any) weight.bias = bias.emplace(op, "bias", *bias_any, n).data();
  }

 private:
  void take_numbers(const char* op, const char* name, const std::optional<Tensor>& any, std::optional<Tensor>& kept,
                    const void*& numbers, Number& type) {
    if (!any) return;
    kept = dense(*any);
    type = number_of(op, name, kept->scalar_type());
    require(kept->dim() == 3 && kept->size(0) == ceil_divide(weight.n, kStripColumns) && kept->size(1) == groups &&
                kept->size(2) == kStripColumns,
            op, ": ", name, " must be [", ceil_divide(weight.n, kStripColumns), ", ", groups, ", 16]");
    numbers = kept->const_data_ptr();
  }

  void take_super(const char* op, const std::optional<Tensor>& any) {
    GroupScales& scales = weight.scales;
    if (!any) {
      if (scales.scale_type == Number::u8) scales.scale_type = Number::e8m0;
      return;
    }
    super = dense(*any);
    const Number type = number_of(op, "super_scale", super->scalar_type());
    const bool is_float = type == Number::f32 || type == Number::bf16 || type == Number::f16;
    require(is_float && super->dim() == 4 && super->size(0) == ceil_divide(weight.n, kStripColumns) &&
                super->size(1) >= 1 && groups % super->size(1) == 0 && (super->size(2) == 1 || super->size(2) == 2) &&
                super->size(3) == kStripColumns,
            op, ": super_scale must be floats [", ceil_divide(weight.n, kStripColumns), ", a divisor of ", groups,
            ", 1 or 2, 16]");
    scales.super = super->const_data_ptr();
    scales.super_type = type;
    scales.supers = super->size(1);
    scales.groups_in_super = groups / super->size(1);
    if (super->size(2) == 2 && scales.minimum_type == Number::none && scales.scale_type == Number::u8) {
      scales.scale_type = Number::low4;
      scales.minimum = scales.scale;
      scales.minimum_type = Number::high4;
    }
    require(super->size(2) == scales.super_rows(), op,
            ": super_scale has two rows if there are minima, and one row otherwise; it has ", super->size(2));
  }

  void check_numbers(const char* op) const {
    const GroupScales& scales = weight.scales;
    require(scales.super || scales.scale_type != Number::s8, op, ": a scale of int8 needs super_scale");
    require(scales.minimum_type != Number::s8 && scales.minimum_type != Number::e4m3, op,
            ": minimum must be float32, bfloat16, float16 or uint8");
    require(scales.minimum_type == Number::none || scales.scale_type != Number::none, op, ": minimum needs scale");
    require(!scales.super || scales.minimum_type == Number::none || scales.minimum_type == Number::u8 ||
                scales.minimum_type == Number::high4,
            op, ": with super_scale, minimum must be uint8");
  }

  void take_table(const char* op, const std::optional<Tensor>& any, std::int64_t bits) {
    if (!any) return;
    table = dense(*any);
    require(bits == 4 && table->scalar_type() == ScalarType::Byte && table->dim() == 1 && table->size(0) == kTableSize,
            op, ": table must be uint8 with 16 values, for codes of 4 bits");
    weight.codes.table = data<std::uint8_t>(*table);
    const int largest = *std::max_element(weight.codes.table, weight.codes.table + kTableSize);
    weight.codes.wide = largest > 127;
    if (!weight.codes.wide) return;
    require(weight.group_size % kBlockK == 0, op, ": table holds ", largest,
            "; with groups that are no multiple of 32, values are 0 .. 127");
    require(largest - std::min(weight.offset, 127) <= 127, op, ": table holds ", largest, " and offset is ",
            weight.offset, "; a value is at most 127 more than the offset");
  }
};

GroupInput input_of(const char* op, std::int64_t bits, std::int64_t group_size) {
  require(bits == 8 || bits == 16, op, ": input_bits must be 8 or 16, is ", bits);
  require(group_size >= 0 && group_size % kBlockK == 0, op,
          ": input_group must be a multiple of 32, or 0 for one scale for each row, is ", group_size);
  require(bits == 8 || group_size == 0, op,
          ": inputs of 16 bits have one scale for each row; input_group must be 0, is ", group_size);
  return {static_cast<int>(bits), group_size};
}

Tensor linear_groups_op(const Tensor& x_any, const Tensor& codes, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& super_scale, const std::optional<Tensor>& minimum,
                        const std::optional<Tensor>& table, const std::optional<Tensor>& column_scale, std::int64_t n,
                        std::int64_t bits, std::int64_t group_size, std::int64_t offset,
                        const std::optional<Tensor>& bias, std::int64_t input_bits, std::int64_t input_group,
                        std::int64_t activation) {
  const char* const op = "linear_groups";
  const FloatType type = float_type(op, "x", x_any.scalar_type());
  require(x_any.dim() >= 1, op, ": x needs at least 1 dimension [..., k], has none");
  const std::int64_t k = x_any.size(x_any.dim() - 1);
  const GroupArguments arguments(op, k, codes, scale, super_scale, minimum, table, column_scale, bias, n, bits,
                                 group_size, offset);
  const GroupInput input = input_of(op, input_bits, input_group);
  const Tensor x = dense(x_any);
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  const Tensor out = empty(sizes, x.scalar_type());
  linear_groups({x.const_data_ptr(), type, rows_before(x, x.dim() - 1)}, arguments.weight, input,
                {out.mutable_data_ptr(), type, activation_of(op, activation)});
  return out;
}

Tensor dequantize_groups_op(const Tensor& codes, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& super_scale, const std::optional<Tensor>& minimum,
                            const std::optional<Tensor>& table, const std::optional<Tensor>& column_scale,
                            std::int64_t n, std::int64_t bits, std::int64_t group_size, std::int64_t offset,
                            std::int64_t k, ScalarType dtype) {
  const char* const op = "dequantize_groups";
  require(k >= 0, op, ": k must not be negative, is ", k);
  const FloatType type = float_type(op, "dtype", dtype);
  const GroupArguments arguments(op, k, codes, scale, super_scale, minimum, table, column_scale, std::nullopt, n, bits,
                                 group_size, offset);
  const Tensor out = empty({n, k}, dtype);
  dequantize_groups(arguments.weight, out.mutable_data_ptr(), type);
  return out;
}

Tensor embedding_groups_op(const Tensor& ids_any, const Tensor& codes, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& super_scale, const std::optional<Tensor>& minimum,
                           const std::optional<Tensor>& table, const std::optional<Tensor>& column_scale,
                           std::int64_t n, std::int64_t bits, std::int64_t group_size, std::int64_t offset,
                           std::int64_t k, ScalarType dtype) {
  const char* const op = "embedding_groups";
  require(k >= 0, op, ": k must not be negative, is ", k);
  const FloatType type = float_type(op, "dtype", dtype);
  const GroupArguments arguments(op, k, codes, scale, super_scale, minimum, table, column_scale, std::nullopt, n, bits,
                                 group_size, offset);
  const IdsArgument ids(op, ids_any, n);
  const Tensor out = ids.rows(k, dtype);
  embedding_groups(arguments.weight, ids.ids, out.mutable_data_ptr(), type);
  return out;
}

Tensor pack_planes_op(const Tensor& codes_any, std::int64_t bits) {
  check_bits("pack_planes", bits);
  require(codes_any.dim() == 2 && codes_any.scalar_type() == ScalarType::Byte,
          "pack_planes: codes must be uint8 [n, k]");
  const Tensor codes = dense(codes_any);
  const std::int64_t n = codes.size(0), k = codes.size(1);
  const Tensor planes = empty({ceil_divide(n, kStripColumns), plane_blocks(k), bits, kLineBytes}, ScalarType::Byte);
  pack_planes(data<std::uint8_t>(codes), n, k, static_cast<int>(bits), mutable_data<std::uint8_t>(planes));
  return planes;
}

Tensor unpack_planes_op(const Tensor& planes_any, std::int64_t n, std::int64_t k) {
  require(n >= 0 && k >= 0, "unpack_planes: n and k must not be negative, got ", n, " and ", k);
  const Tensor planes = dense(planes_any);
  const std::int64_t bits = planes.dim() == 4 ? planes.size(2) : 0;
  check_bits("unpack_planes", bits);
  check_planes("unpack_planes", "planes", planes, n, k, bits);
  const Tensor codes = empty({n, k}, ScalarType::Byte);
  unpack_planes(data<std::uint8_t>(planes), n, k, static_cast<int>(bits), mutable_data<std::uint8_t>(codes));
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(octavo, m) {
  m.def(
      "linear_groups(Tensor x, Tensor codes, Tensor? scale, Tensor? super_scale, Tensor? minimum, Tensor? table, "
      "Tensor? column_scale, int n, int bits, int group_size, int offset, Tensor? bias, int input_bits=8, "
      "int input_group=0, int activation=0) -> Tensor");
  m.def(
      "dequantize_groups(Tensor codes, Tensor? scale, Tensor? super_scale, Tensor? minimum, Tensor? table, "
      "Tensor? column_scale, int n, int bits, int group_size, int offset, int k, ScalarType dtype) -> Tensor");
  m.def(
      "embedding_groups(Tensor ids, Tensor codes, Tensor? scale, Tensor? super_scale, Tensor? minimum, Tensor? table, "
      "Tensor? column_scale, int n, int bits, int group_size, int offset, int k, ScalarType dtype) -> Tensor");
  m.def("pack_planes(Tensor codes, int bits) -> Tensor");
  m.def("unpack_planes(Tensor planes, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("linear_groups", TORCH_BOX(&linear_groups_op));
  m.impl("dequantize_groups", TORCH_BOX(&dequantize_groups_op));
  m.impl("embedding_groups", TORCH_BOX(&embedding_groups_op));
  m.impl("pack_planes", TORCH_BOX(&pack_planes_op));
  m.impl("unpack_planes", TORCH_BOX(&unpack_planes_op));
}

}  // namespace octavo
