// SPDX-License-Identifier: Apache-2.0
// Types whose codes are places in a table of 16 values.
#include "encode.h"
#include "isa/common/group_numbers.h"
#include "search.h"

namespace octavo {

const std::int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// Floats of 4 bits, e2m1, doubled.
const std::int8_t kFloat4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

namespace {

constexpr int kBlock = 32, kTrials = 7;

// The code of the nearest value, of two the higher one.
int nearest_iq4(float x) {
  if (x <= kIq4Values[0]) return 0;
  if (x >= kIq4Values[15]) return 15;
  int low = 0, high = 15;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const bool is_below = x < kIq4Values[middle];
    high = is_below ? middle : high;
    low = is_below ? low : middle;
  }
  return x - kIq4Values[high - 1] < kIq4Values[high] - x ? high - 1 : high;
}

// The scale of one block; 0 if all of it is 0. `mean_square` is twice that of the whole block or super-block.
float search_iq4(const BlockInput& input, int first, float mean_square) {
  const float* const x = input.x + first;
  const float extreme = signed_extreme(x, kBlock);
  if (std::fabs(extreme) < kSmallestMagnitude) return 0.0f;
  float w[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    w[i] = input.importance ? input.importance[first + i] * std::sqrt(mean_square + x[i] * x[i]) : x[i] * x[i];
  }
  const auto fit = [&](float inverse) {
    FitSums sums;
    for (int i = 0; i < kBlock; ++i) {
      const auto value = static_cast<float>(kIq4Values[nearest_iq4(inverse * x[i])]);
      sums.xl += w[i] * value * x[i];
      sums.ll += w[i] * value * value;
    }
    return sums;
  };
  FitSums sums = fit(1.0f / (-extreme / static_cast<float>(kIq4Values[0])));
  float scale = sums.xl / sums.ll, best = scale * sums.xl;
  for (int trial = -kTrials; trial <= kTrials; ++trial) {
    sums = fit(static_cast<float>(trial + kIq4Values[0]) / extreme);
    if (sums.ll > 0.0f && sums.xl * sums.xl > best * sums.ll) {
      scale = sums.xl / sums.ll;
      best = scale * sums.xl;
    }
  }
  return scale;
}

float twice_mean_square(const float* x, int count) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += x[i] * x[i];
  return sum * (2.0f / static_cast<float>(count));
}

void choose_iq4(const float* x, float scale, std::uint8_t* codes) {
  const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<std::uint8_t>(nearest_iq4(inverse * x[i]));
}

// The code of the nearest of 16 values times `scale`, the first one of several.
int nearest_float4(float x, float scale) {
  int nearest = 0;
  float least = std::fabs(static_cast<float>(kFloat4Values[0]) * scale - x);
  for (int code = 1; code < kTableSize; ++code) {
    const float off = std::fabs(static_cast<float>(kFloat4Values[code]) * scale - x);
    if (off < least) {
      least = off;
      nearest = code;
    }
  }
  return nearest;
}

// An unsigned float of 4 bits of exponent and 3 of fraction; halves are rounded up.
std::uint8_t e4m3_of(float x) {
  if (!(x > 0.0f)) return 0;
  x = std::min(x, 448.0f);
  const std::uint32_t bits = bits_of(x);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 7;
  if (exponent <= 0) return static_cast<std::uint8_t>(std::min(7, static_cast<int>(x * 512.0f + 0.5f)));
  if (exponent >= 15) return 0x7e;
  const int rounded = (exponent << 3 | static_cast<int>(bits >> 20 & 7)) + static_cast<int>(bits >> 19 & 1);
  return static_cast<std::uint8_t>(rounded >= 15 << 3 ? 0x7e : rounded);
}

}  // namespace

void encode_iq4_nl(const BlockInput& input, BlockParts& parts) {
  const float scale = search_iq4(input, 0, twice_mean_square(input.x, kBlock));
  parts.halves[0] = f16_from_float(scale);
  choose_iq4(input.x, scale, parts.codes);
}

void encode_iq4_xs(const BlockInput& input, BlockParts& parts) {
  const float mean_square = twice_mean_square(input.x, kMostElements);
  float scales[8];
  for (int g = 0; g < 8; ++g) scales[g] = search_iq4(input, kBlock * g, mean_square);
  const float step = -signed_extreme(scales, 8) / 32.0f, inverse = step != 0.0f ? 1.0f / step : 0.0f;
  parts.halves[0] = f16_from_float(step);
  for (int g = 0; g < 8; ++g) {
    const int scale = clamped(nearest_int(inverse * scales[g]), -32, 31);
    parts.scale[g] = static_cast<std::uint8_t>(scale);
    choose_iq4(input.x + kBlock * g, step * static_cast<float>(scale), parts.codes + kBlock * g);
  }
}

void encode_mxfp4(const BlockInput& input, BlockParts& parts) {
  const float magnitude = std::fabs(signed_extreme(input.x, kBlock));
  const float exponent = magnitude > 0.0f ? std::floor(std::log2(magnitude)) - 2.0f + 127.0f : 0.0f;
  parts.scale[0] = static_cast<std::uint8_t>(std::max(0, static_cast<int>(exponent)));
  const float scale = 0.5f * float_from_e8m0(parts.scale[0]);
  for (int i = 0; i < kBlock; ++i) parts.codes[i] = static_cast<std::uint8_t>(nearest_float4(input.x[i], scale));
}

void encode_nvfp4(const BlockInput& input, BlockParts& parts) {
  for (int g = 0; g < 4; ++g) {
    const float* const x = input.x + 16 * g;
    parts.scale[g] = e4m3_of(std::fabs(signed_extreme(x, 16)) / 6.0f);
    const float scale = 0.5f * float_from_e4m3(parts.scale[g]);
    for (int i = 0; i < 16; ++i) parts.codes[16 * g + i] = static_cast<std::uint8_t>(nearest_float4(x[i], scale));
  }
}

}  // namespace octavo
