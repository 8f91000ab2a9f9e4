// SPDX-License-Identifier: Apache-2.0
// A random layer with int8 weights, packed.
#pragma once

#include <cstdint>
#include <vector>

#include "drivers/linear.h"
#include "drivers/pack.h"
#include "drivers/saturating.h"
#include "support.h"

namespace octavo::test {

struct Int8Layer {
  Int8Layer(std::int64_t n_, std::int64_t k_, unsigned seed) : n(n_), k(k_), codes(static_cast<std::size_t>(n_ * k_)) {
    Random random(seed);
    fill_codes(codes, CodePattern::random, random);
    strips.resize(static_cast<std::size_t>(packed_bytes(n, k)));
    column_sum.resize(static_cast<std::size_t>(n));
    pack_weight(codes.data(), n, k, k, 1, strips.data(), column_sum.data());
    listed = list_saturating(strips.data(), n, k);
    for (std::int64_t j = 0; j < n; ++j) {
      scale.push_back(std::uniform_real_distribution<float>(1e-3f, 1e-2f)(random));
      bias.push_back(std::uniform_real_distribution<float>(-1.0f, 1.0f)(random));
    }
  }
  // With a list of words, so that AVX2 multiplies bytes; other kernels do not look at it.
  PackedWeight weight() const {
    const SaturatingWords words = words_in("test", listed.data(), static_cast<std::int64_t>(listed.size()), n);
    return {strips.data(), column_sum.data(), scale.data(), bias.data(), n, k, nullptr, words};
  }

  // Without it AVX2 multiplies int16.
  Int8Layer without_list() const {
    Int8Layer layer = *this;
    layer.listed.clear();
    return layer;
  }

  std::int64_t n, k;
  std::vector<std::int8_t> codes, strips;
  std::vector<std::int32_t> column_sum, listed;
  std::vector<float> scale, bias;
};

struct LayerShape {
  std::int64_t m, n, k;
};

}  // namespace octavo::test
