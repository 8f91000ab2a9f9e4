// SPDX-License-Identifier: Apache-2.0
// Blocks from floats and to floats, rows in parallel.
#include <atomic>
#include <cmath>

#include "base/check.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "ggml.h"
#include "isa/common/group_numbers.h"

namespace octavo {
namespace {

constexpr std::int64_t kElementsToEncode = 1 << 12, kElementsToDecode = 1 << 16;  // of one task

thread_local Scratch floats_scratch;

std::int64_t rows_in_task(const BlockMatrix& shape, std::int64_t elements) {
  return std::max<std::int64_t>(1, elements / std::max<std::int64_t>(shape.k, 1));
}

// The row as float32: where it is, or widened.
const float* widened(const void* x, FloatType type, std::int64_t first, std::int64_t count) {
  if (type == FloatType::f32) return static_cast<const float*>(x) + first;
  auto* const floats = reinterpret_cast<float*>(floats_scratch.get(4 * count));
  for (std::int64_t i = 0; i < count; ++i) floats[i] = load_float(x, type, first + i);
  return floats;
}

bool is_finite(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffffu);
  return largest < 0x7f800000u;
}

bool has_finite_scales(const BlockForm& form, const BlockParts& parts) {
  for (int i = 0; i < form.half_count(); ++i) {
    if ((parts.halves[i] & 0x7c00) == 0x7c00) return false;
  }
  return true;
}

enum Refusal : int { kTaken, kNotFinite, kTooLarge };

Refusal encode_row(const BlockMatrix& shape, const float* x, const float* importance, std::uint8_t* out) {
  if (!is_finite(x, shape.k)) return kNotFinite;
  BlockInput input{x, importance, 0.0f};
  if (importance) {
    for (std::int64_t i = 0; i < shape.k; ++i) input.mean_square += x[i] * x[i];
    input.mean_square /= static_cast<float>(shape.k);
  }
  BlockParts parts{};
  for (std::int64_t block = 0; block < shape.row_blocks(); ++block) {
    shape.form.encode(input, parts);
    if (!has_finite_scales(shape.form, parts)) return kTooLarge;
    shape.form.put_together(parts, out);
    out += shape.form.bytes;
    input.x += shape.form.elements;
    if (importance) input.importance += shape.form.elements;
  }
  return kTaken;
}

// The values of a group: scale * code, and then plus minimum. Where there is no minimum none is added: -0 stays.
template <bool kHasMinimum>
void decode_group(const std::int8_t* steps, int count, ScaleAndMinimum numbers, float* out) {
  for (int i = 0; i < count; ++i) {
    const float value = numbers.scale * static_cast<float>(steps[i]);
    out[i] = kHasMinimum ? value + numbers.minimum : value;
  }
}

ScaleAndMinimum numbers_of(const BlockForm& form, const BlockParts& parts, int group) {
  const float d = float_from_f16(parts.halves[0]), m = float_from_f16(parts.halves[1]);
  if (!form.has_scale_bytes()) return {d, m};
  const float scale = number(parts.scale, form.scale, group);
  if (!form.two_levels) return {form.unit * scale, 0.0f};
  const auto* const minima = form.minimum == Number::high4 ? parts.scale : parts.minimum;
  return {d * scale, form.has_minimum() ? -(m * number(minima, form.minimum, group)) : 0.0f};
}

void decode_block(const BlockForm& form, const BlockParts& parts, float* out) {
  std::int8_t steps[kMostElements];
  if (form.values) {
    for (int i = 0; i < form.elements; ++i) steps[i] = form.values[parts.codes[i]];
  } else {
    const auto offset = static_cast<std::uint8_t>(form.offset);
    for (int i = 0; i < form.elements; ++i) {
      steps[i] = static_cast<std::int8_t>(static_cast<std::uint8_t>(parts.codes[i] - offset));
    }
  }
  for (int group = 0; group < form.groups(); ++group) {
    const int first = group * form.group;
    const auto decode = form.has_minimum() ? decode_group<true> : decode_group<false>;
    decode(steps + first, form.group, numbers_of(form, parts, group), out + first);
  }
}

}  // namespace

void encode_blocks(const BlockMatrix& shape, const void* x, FloatType type, const float* importance,
                   std::uint8_t* blocks) {
  std::atomic<int> refused{kTaken};
  parallel(shape.n, rows_in_task(shape, kElementsToEncode), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end && refused == kTaken; ++row) {
      const float* const floats = widened(x, type, row * shape.k, shape.k);
      const Refusal refusal = encode_row(shape, floats, importance, blocks + row * shape.row_bytes());
      if (refusal != kTaken) refused = refusal;
    }
  });
  require(refused != kNotFinite, "ggml_quantize: x holds NaN or Inf; finite values are needed");
  require(refused != kTooLarge, "ggml_quantize: x holds values that need a scale above 65504, which float16 and so ",
          shape.form.name, " do not have; scale the weight down");
}

void decode_blocks(const BlockMatrix& shape, const std::uint8_t* blocks, void* out, FloatType type) {
  const BlockForm& form = shape.form;
  parallel(shape.n, rows_in_task(shape, kElementsToDecode), [&](std::int64_t begin, std::int64_t end) {
    BlockParts parts{};
    float floats[kMostElements];
    const std::uint8_t* block = blocks + begin * shape.row_bytes();
    std::int64_t at = begin * shape.k;
    for (std::int64_t i = begin * shape.row_blocks(); i < end * shape.row_blocks(); ++i) {
      form.take_apart(block, parts);
      block += form.bytes;
      if (type == FloatType::f32) {
        decode_block(form, parts, static_cast<float*>(out) + at);
      } else {
        decode_block(form, parts, floats);
        for (int j = 0; j < form.elements; ++j) store_float(out, type, at + j, floats[j]);
      }
      at += form.elements;
    }
  });
}

}  // namespace octavo
