// SPDX-License-Identifier: Apache-2.0
// Scales of a group by search: several candidates are tried, each is refitted by least squares, and the best one stays.
//
// These are the searches of ggml, and codes are those of ggml byte for byte. So every sum is added up in float32 in the order
// of the elements, no product and sum are joined into an fma (the compile flags of the whole core say so), and oddities
// stay as they are; docs/numerics.md names them.
// Source: ggml 0.25, ggml-quants.c: make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace octavo {

constexpr float kSmallestMagnitude = 1e-15f;  // groups below it are all zeros

// Half to even, for |x| below 2^22; beyond, what ggml gives.
inline int nearest_int(float x) {
  const float shifted = x + 12582912.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return (bits & 0x007fffff) - 0x00400000;
}

inline int clamped(int x, int low, int high) { return std::max(low, std::min(high, x)); }

// The element of the largest magnitude, the first one of several, with its sign; 0 if all are 0.
inline float signed_extreme(const float* x, int count) {
  float magnitude = 0.0f, extreme = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (std::fabs(x[i]) > magnitude) {
      magnitude = std::fabs(x[i]);
      extreme = x[i];
    }
  }
  return extreme;
}

// Sums of least squares: w * x * l and w * l * l.
struct FitSums {
  float xl = 0.0f, ll = 0.0f;

  void add(float w, float x, int l) {
    const auto level = static_cast<float>(l);
    xl += w * x * level;
    ll += w * level * level;
  }
};

// x = scale * (code - levels), codes 0 .. 2 * levels - 1, with weights w; null: x^2. Returns the scale.
inline float search_signed(const float* x, const float* w, int count, int levels, std::uint8_t* codes) {
  const float extreme = signed_extreme(x, count);
  if (std::fabs(extreme) < kSmallestMagnitude) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return 0.0f;
  }
  const auto level_of = [&](float inverse, int i) { return clamped(nearest_int(inverse * x[i]), -levels, levels - 1); };
  const auto fit = [&](float inverse) {
    FitSums sums;
    for (int i = 0; i < count; ++i) sums.add(w ? w[i] : x[i] * x[i], x[i], level_of(inverse, i));
    return sums;
  };
  float best_inverse = static_cast<float>(-levels) / extreme;
  FitSums sums = fit(best_inverse);
  float scale = sums.ll != 0.0f ? sums.xl / sums.ll : 0.0f, best = scale * sums.xl;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    const float inverse = -(static_cast<float>(levels) + 0.1f * static_cast<float>(step)) / extreme;
    sums = fit(inverse);
    if (sums.ll > 0.0f && sums.xl * sums.xl > best * sums.ll) {
      best_inverse = inverse;
      scale = sums.xl / sums.ll;
      best = scale * sums.xl;
    }
  }
  for (int i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(level_of(best_inverse, i) + levels);
  return scale;
}

// One code after the other moves to where it is best while the others stay, at most five times through all of them.
// `levels` are the codes; a move is taken if it makes the fit better. limit(l) bounds a code. With `needs_rest` the codes that
// stay must have a fit of their own.
template <class Code, class Weight, class Limit>
void descend(const float* x, int count, const Weight& weight, const Limit& limit, bool needs_rest, Code* levels,
             FitSums& sums) {
  for (int sweep = 0; sweep < 5; ++sweep) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
      const float w = weight(i), own = static_cast<float>(levels[i]);
      float xl = sums.xl - w * x[i] * own, ll = sums.ll - w * own * own;
      if (!(xl > 0.0f) || (needs_rest && !(ll > 0.0f))) continue;
      const int level = limit(nearest_int(x[i] * ll / xl));
      if (level == levels[i]) continue;
      const auto moved_to = static_cast<float>(level);
      xl += w * x[i] * moved_to;
      ll += w * moved_to * moved_to;
      if (ll > 0.0f && xl * xl * sums.ll > sums.xl * sums.xl * ll) {
        levels[i] = static_cast<Code>(level);
        sums = {xl, ll};
        moved = true;
      }
    }
    if (!moved) return;
  }
}

// As search_signed with weights x^2: no trials, and codes that move one by one.
inline float search_by_descent(const float* x, int count, int levels, std::uint8_t* codes) {
  const float extreme = signed_extreme(x, count);
  if (std::fabs(extreme) < kSmallestMagnitude) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return 0.0f;
  }
  const float inverse = static_cast<float>(-levels) / extreme;
  std::int8_t signed_codes[32];
  FitSums sums;
  for (int i = 0; i < count; ++i) {
    signed_codes[i] = static_cast<std::int8_t>(clamped(nearest_int(inverse * x[i]), -levels, levels - 1));
    sums.add(x[i] * x[i], x[i], signed_codes[i]);
  }
  descend(
      x, count, [&](int i) { return x[i] * x[i]; }, [&](int level) { return clamped(level, -levels, levels - 1); },
      false, signed_codes, sums);
  for (int i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(signed_codes[i] + levels);
  return sums.ll > 0.0f ? sums.xl / sums.ll : 0.0f;
}

// x = scale * code for numbers that are not negative, codes 0 .. top, with weights w. Returns the scale.
inline float search_positive(const float* x, const float* w, int count, int top, std::uint8_t* codes) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::max(largest, x[i]);
  if (largest < kSmallestMagnitude) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return 0.0f;
  }
  const auto error_of = [&](float inverse, bool is_bounded) {
    const float scale = 1.0f / inverse;
    float error = 0.0f;
    for (int i = 0; i < count; ++i) {
      const int level = nearest_int(inverse * x[i]);
      const float off = x[i] - scale * static_cast<float>(is_bounded ? std::min(top, level) : level & 255);
      error += w[i] * off * off;
    }
    return error;
  };
  float inverse = static_cast<float>(top) / largest, least = error_of(inverse, false);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const float trial = (0.1f * static_cast<float>(step) + static_cast<float>(top)) / largest;
    const float error = error_of(trial, true);
    if (error < least) {
      least = error;
      inverse = trial;
    }
  }
  FitSums sums;
  for (int i = 0; i < count; ++i) {
    const int level = std::min(top, nearest_int(inverse * x[i]));
    codes[i] = static_cast<std::uint8_t>(level);
    sums.add(w[i], x[i], level);
  }
  descend(x, count, [&](int i) { return w[i]; }, [&](int level) { return std::min(top, level); }, true, codes, sums);
  return sums.ll > 0.0f ? sums.xl / sums.ll : 0.0f;
}

// How many scales search_affine tries: those of top + first + i * step levels for i = 0 .. last.
struct Trials {
  float first, step;
  int last;
};

struct AffineFit {
  float scale, minimum;  // x = scale * code - minimum
};

// x = scale * code - minimum with codes 0 .. top and minimum >= 0. The error is the sum of w * |off|, or of w * off^2.
// When a trial is the best so far, later ones start from the minimum that it found.
inline AffineFit search_affine(const float* x, const float* w, int count, int top, Trials trials, bool absolute,
                               std::uint8_t* codes) {
  float low = x[0], high = x[0], sum_w = w[0], sum_x = sum_w * x[0];
  for (int i = 1; i < count; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    sum_w += w[i];
    sum_x += w[i] * x[i];
  }
  if (low > 0.0f) low = 0.0f;
  if (high <= low) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return {0.0f, -low};
  }
  std::uint8_t tried[32];
  const auto error_of = [&](const std::uint8_t* levels, float scale, float minimum) {
    float error = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float off = scale * static_cast<float>(levels[i]) + minimum - x[i];
      error += w[i] * (absolute ? std::fabs(off) : off * off);
    }
    return error;
  };
  const auto level_of = [&](float inverse, int i) { return clamped(nearest_int(inverse * (x[i] - low)), 0, top); };
  const float first_inverse = static_cast<float>(top) / (high - low);
  float scale = 1.0f / first_inverse;
  for (int i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(level_of(first_inverse, i));
  float least = error_of(codes, scale, low);
  for (int trial = 0; trial <= trials.last; ++trial) {
    const float inverse =
        (trials.first + trials.step * static_cast<float>(trial) + static_cast<float>(top)) / (high - low);
    float sum_l = 0.0f, sum_ll = 0.0f, sum_xl = 0.0f;
    for (int i = 0; i < count; ++i) {
      const int level = level_of(inverse, i);
      tried[i] = static_cast<std::uint8_t>(level);
      const auto l = static_cast<float>(level);
      sum_l += w[i] * l;
      sum_ll += w[i] * l * l;
      sum_xl += w[i] * l * x[i];
    }
    const float determinant = sum_w * sum_ll - sum_l * sum_l;
    if (!(determinant > 0.0f)) continue;
    float new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant,
          new_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant;
    if (new_low > 0.0f) {
      new_low = 0.0f;
      new_scale = sum_xl / sum_ll;
    }
    const float error = error_of(tried, new_scale, new_low);
    if (error < least) {
      std::memcpy(codes, tried, static_cast<std::size_t>(count));
      least = error;
      scale = new_scale;
      low = new_low;
    }
  }
  return {scale, -low};
}

}  // namespace octavo
