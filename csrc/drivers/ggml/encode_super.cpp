// SPDX-License-Identifier: Apache-2.0
// The K types. Each group is searched for its own scale; these become small integers times a float16 number of the block, and
// then each element takes the nearest code of what was stored.
#include "encode.h"
#include "isa/common/half.h"
#include "search.h"

namespace octavo {
namespace {

constexpr int kSuper = 256;
constexpr Trials kManyTrials = {-0.9f, 0.05f, 36};

float sum_of_squares(const float* x, int count) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += x[i] * x[i];
  return sum;
}

// The weights of a group's elements, im * sqrt(mean square + x^2), and their sum.
float importance_weights(const BlockInput& input, int first, int count, float mean_square, float* w) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float x = input.x[first + i];
    w[i] = input.importance[first + i] * std::sqrt(mean_square + x * x);
  }
  for (int i = 0; i < count; ++i) sum += w[i];
  return sum;
}

// Codes of the nearest values of scale * (code - offset) - minimum. Groups whose scale is 0 keep the codes they have.
void requantize(const float* x, int count, float scale, float minimum, int offset, int top, std::uint8_t* codes) {
  if (scale == 0.0f) return;
  for (int i = 0; i < count; ++i) {
    codes[i] =
        static_cast<std::uint8_t>(clamped(nearest_int((x[i] + minimum) / scale), -offset, top - offset) + offset);
  }
}

// --- types with minima: Q2_K, Q4_K, Q5_K ---

struct AffineType {
  int group, top, largest;  // codes 0 .. top; scales and minima 0 .. largest
  Trials trials;
  bool
      absolute;  // weights |x| and absolute errors, where others have the root of the mean square in addition, and squares
  float mean_squares;  // how many mean squares of the block importance is joined with
};

void plain_weights(const float* x, const AffineType& type, float* w) {
  const float base = type.absolute ? 0.0f : std::sqrt(sum_of_squares(x, type.group) / static_cast<float>(type.group));
  for (int i = 0; i < type.group; ++i) w[i] = base + std::fabs(x[i]);
}

// Numbers to integers 0 .. largest, against the largest one. Returns what a step is worth.
float integers_of(const float* numbers, int count, int largest, std::uint8_t* integers) {
  float top = 0.0f;
  for (int i = 0; i < count; ++i) top = std::max(top, numbers[i]);
  const float inverse = top > 0.0f ? static_cast<float>(largest) / top : 0.0f;
  for (int i = 0; i < count; ++i) {
    const auto integer = static_cast<std::uint8_t>(nearest_int(inverse * numbers[i]));
    integers[i] = std::min(static_cast<std::uint8_t>(largest), integer);
  }
  return top > 0.0f ? top / static_cast<float>(largest) : 0.0f;
}

void encode_affine(const BlockInput& input, const AffineType& type, BlockParts& parts) {
  const int groups = kSuper / type.group;
  float scales[kMostGroups], minima[kMostGroups], sums[kMostGroups], w[32];
  const float mean_square =
      input.importance ? type.mean_squares * sum_of_squares(input.x, kSuper) / static_cast<float>(kSuper) : 0.0f;
  for (int g = 0; g < groups; ++g) {
    const int first = g * type.group;
    if (input.importance) {
      sums[g] = importance_weights(input, first, type.group, mean_square, w);
    } else {
      plain_weights(input.x + first, type, w);
    }
    const AffineFit fit =
        search_affine(input.x + first, w, type.group, type.top, input.importance ? kManyTrials : type.trials,
                      type.absolute && !input.importance, parts.codes + first);
    scales[g] = fit.scale;
    minima[g] = fit.minimum;
  }
  float steps[2];
  if (input.importance) {
    steps[0] = search_positive(scales, sums, groups, type.largest, parts.scale);
    steps[1] = search_positive(minima, sums, groups, type.largest, parts.minimum);
  } else {
    steps[0] = integers_of(scales, groups, type.largest, parts.scale);
    steps[1] = integers_of(minima, groups, type.largest, parts.minimum);
  }
  for (int i = 0; i < 2; ++i) {
    parts.halves[i] = f16_from_float(steps[i]);
    steps[i] = float_from_f16(parts.halves[i]);
  }
  for (int g = 0; g < groups; ++g) {
    requantize(input.x + g * type.group, type.group, steps[0] * static_cast<float>(parts.scale[g]),
               steps[1] * static_cast<float>(parts.minimum[g]), 0, type.top, parts.codes + g * type.group);
  }
}

// --- types without: Q3_K, Q6_K ---

// Signed scales, already stored, times that of the block; then the codes.
void requantize_groups(const BlockInput& input, int levels, BlockParts& parts) {
  const float step = float_from_f16(parts.halves[0]);
  for (int g = 0; g < kMostGroups; ++g) {
    const auto scale = static_cast<float>(static_cast<std::int8_t>(parts.scale[g]));
    requantize(input.x + 16 * g, 16, step * scale, 0.0f, levels, 2 * levels - 1, parts.codes + 16 * g);
  }
}

}  // namespace

void encode_q2_k(const BlockInput& input, BlockParts& parts) {
  encode_affine(input, {16, 3, 15, {-0.5f, 0.1f, 15}, true, 1.0f}, parts);
  for (int g = 0; g < kMostGroups; ++g) {
    parts.scale[g] = static_cast<std::uint8_t>(parts.scale[g] | parts.minimum[g] << 4);
  }
}

void encode_q4_k(const BlockInput& input, BlockParts& parts) {
  encode_affine(input, {32, 15, 63, {-1.0f, 0.1f, 20}, false, 2.0f}, parts);
}

void encode_q5_k(const BlockInput& input, BlockParts& parts) {
  encode_affine(input, {32, 31, 63, {-0.5f, 0.1f, 15}, false, 2.0f}, parts);
}

void encode_q3_k(const BlockInput& input, BlockParts& parts) {
  float scales[kMostGroups], sums[kMostGroups], w[16];
  const float mean_square = 2.0f * sum_of_squares(input.x, kSuper) / static_cast<float>(kSuper);
  for (int g = 0; g < kMostGroups; ++g) {
    const float* const x = input.x + 16 * g;
    if (input.importance) {
      sums[g] = importance_weights(input, 16 * g, 16, mean_square, w);
      scales[g] = search_signed(x, w, 16, 4, parts.codes + 16 * g);
    } else {
      scales[g] = search_by_descent(x, 16, 4, parts.codes + 16 * g);
    }
  }
  if (input.importance) {
    std::uint8_t shifted[kMostGroups];
    parts.halves[0] = f16_from_float(search_signed(scales, sums, kMostGroups, 32, shifted));
    for (int g = 0; g < kMostGroups; ++g) parts.scale[g] = static_cast<std::uint8_t>(shifted[g] - 32);
  } else if (const float extreme = signed_extreme(scales, kMostGroups); extreme != 0.0f) {
    const float inverse = -32.0f / extreme;
    for (int g = 0; g < kMostGroups; ++g) {
      parts.scale[g] = static_cast<std::uint8_t>(clamped(nearest_int(inverse * scales[g]), -32, 31));
    }
    parts.halves[0] = f16_from_float(1.0f / inverse);
  } else {
    parts.halves[0] = 0;
    std::memset(parts.scale, -32, kMostGroups);  // as ggml leaves them
  }
  requantize_groups(input, 4, parts);
}

void encode_q6_k(const BlockInput& input, BlockParts& parts) {
  float scales[kMostGroups];
  for (int g = 0; g < kMostGroups; ++g) {
    const float* const w = input.importance ? input.importance + 16 * g : nullptr;
    scales[g] = search_signed(input.x + 16 * g, w, 16, 32, parts.codes + 16 * g);
  }
  const float extreme = signed_extreme(scales, kMostGroups);
  if (std::fabs(extreme) < kSmallestMagnitude) {
    parts = BlockParts{};
    return;
  }
  const float inverse = -128.0f / extreme;
  parts.halves[0] = f16_from_float(1.0f / inverse);
  for (int g = 0; g < kMostGroups; ++g) {
    parts.scale[g] = static_cast<std::uint8_t>(std::min(127, nearest_int(inverse * scales[g])));
  }
  requantize_groups(input, 32, parts);
}

}  // namespace octavo
