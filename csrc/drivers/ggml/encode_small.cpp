// SPDX-License-Identifier: Apache-2.0
// Types with one scale for a block. Without importance a scale comes from the range; with it, from a search.
#include <cfloat>

#include "encode.h"
#include "isa/common/half.h"
#include "search.h"

namespace octavo {
namespace {

constexpr int kBlock = 32;
constexpr Trials kManyTrials = {-0.9f, 0.05f, 36};

float inverse_of(float scale) { return scale != 0.0f ? 1.0f / scale : 0.0f; }

float magnitude_of(const float* x, int count) { return std::fabs(signed_extreme(x, count)); }

void importance_weights(const BlockInput& input, float (&w)[kBlock]) {
  for (int i = 0; i < kBlock; ++i) w[i] = input.importance[i] * std::sqrt(input.mean_square + input.x[i] * input.x[i]);
}

// u in 0 .. 2 * levels - 1 around `levels`.
void encode_symmetric(const BlockInput& input, int levels, BlockParts& parts) {
  if (input.importance) {
    float w[kBlock];
    importance_weights(input, w);
    parts.halves[0] = f16_from_float(search_signed(input.x, w, kBlock, levels, parts.codes));
    return;
  }
  const float scale = signed_extreme(input.x, kBlock) / static_cast<float>(-levels), inverse = inverse_of(scale);
  parts.halves[0] = f16_from_float(scale);
  for (int i = 0; i < kBlock; ++i) {
    const auto level = static_cast<int>(input.x[i] * inverse + (static_cast<float>(levels) + 0.5f));
    parts.codes[i] = static_cast<std::uint8_t>(std::min(2 * levels - 1, level));
  }
}

void encode_affine(const BlockInput& input, int top, BlockParts& parts) {
  if (input.importance) {
    float w[kBlock];
    importance_weights(input, w);
    const AffineFit fit = search_affine(input.x, w, kBlock, top, kManyTrials, false, parts.codes);
    parts.halves[0] = f16_from_float(fit.scale);
    parts.halves[1] = f16_from_float(-fit.minimum);
    return;
  }
  const auto [low, high] = std::minmax_element(input.x, input.x + kBlock);
  const float scale = (*high - *low) / static_cast<float>(top), inverse = inverse_of(scale);
  parts.halves[0] = f16_from_float(scale);
  parts.halves[1] = f16_from_float(*low);
  for (int i = 0; i < kBlock; ++i) {
    const auto level = static_cast<int>((input.x[i] - *low) * inverse + 0.5f);
    parts.codes[i] = static_cast<std::uint8_t>(std::min(top, level));
  }
}

// -1, 0 or 1, plus 1.
void encode_thirds(const BlockInput& input, int count, BlockParts& parts) {
  const float scale = magnitude_of(input.x, count), inverse = inverse_of(scale);
  parts.halves[0] = f16_from_float(scale);
  for (int i = 0; i < count; ++i) parts.codes[i] = static_cast<std::uint8_t>(std::round(input.x[i] * inverse) + 1.0f);
}

}  // namespace

void encode_q4_0(const BlockInput& input, BlockParts& parts) { encode_symmetric(input, 8, parts); }
void encode_q5_0(const BlockInput& input, BlockParts& parts) { encode_symmetric(input, 16, parts); }
void encode_q4_1(const BlockInput& input, BlockParts& parts) { encode_affine(input, 15, parts); }
void encode_q5_1(const BlockInput& input, BlockParts& parts) { encode_affine(input, 31, parts); }
void encode_q2_0(const BlockInput& input, BlockParts& parts) { encode_thirds(input, 64, parts); }
void encode_ternary(const BlockInput& input, BlockParts& parts) { encode_thirds(input, 256, parts); }

void encode_q8_0(const BlockInput& input, BlockParts& parts) {
  const float scale = magnitude_of(input.x, kBlock) / 127.0f, inverse = inverse_of(scale);
  parts.halves[0] = f16_from_float(scale);
  for (int i = 0; i < kBlock; ++i) {
    parts.codes[i] = static_cast<std::uint8_t>(static_cast<int>(std::round(input.x[i] * inverse)) + 128);
  }
}

void encode_q1_0(const BlockInput& input, BlockParts& parts) {
  float sum = 0.0f;
  for (int i = 0; i < 128; ++i) {
    sum += std::fabs(input.x[i]);
    parts.codes[i] = input.x[i] >= 0.0f ? 2 : 0;
  }
  parts.halves[0] = f16_from_float(sum / 128.0f);
}

}  // namespace octavo
