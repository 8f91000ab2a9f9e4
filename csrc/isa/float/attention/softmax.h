// SPDX-License-Identifier: Apache-2.0
// Turns scores into weights, a block of keys at a time (online softmax). A row keeps its largest score, the total of its
// weights relative to the largest score, and its sums of weighted values. A larger score in a later block scales the total and
// the sums down.
//
// Scores are exponents of two. A hidden score is -Inf, and its weight is 0. A row that sees no key has total 0.
#pragma once

#include "isa/float/tile/tile.h"
#include "isa/float/vector/exp.h"

namespace octavo {
namespace {

// One query's part of a block.
struct ScoreRow {
  float* scores;
  std::int64_t width, limit;  // how many scores the block has, and how many of its keys the query may look at
  const void* mask;           // the query's row of the mask, from key 0 on
  std::int64_t first_key;     // the first key of the block
  float* weights;
  float *sums, *largest, *total;
};

struct NoMask {
  static constexpr bool kHides = false;
  Vector bias(std::int64_t, std::int64_t) const { return set(0.0f); }
};

struct LookMask {
  static constexpr bool kHides = true;
  const void* row;
  Vector bias(std::int64_t key, std::int64_t count) const { return bias_of_bytes(row, key, count); }
};

template <FloatType kType>
struct AddMask {
  static constexpr bool kHides = true;
  const void* row;
  Vector scale;
  Vector bias(std::int64_t key, std::int64_t count) const { return load<kType>(row, key, count) * scale; }
};

// Calls f(mask): turns a kind of mask that is known at run time into a type.
template <class F>
inline void with_mask(const Attention& a, const void* row, const F& f) {
  switch (a.mask_kind) {
    case MaskKind::none: return f(NoMask{});
    case MaskKind::look: return f(LookMask{row});
    case MaskKind::add:
      with_type(a.mask.type, [&](auto type) { f(AddMask<decltype(type)::value>{row, set(a.mask_scale)}); });
  }
}

// 0 in the first `count` lanes, -Inf in the others.
inline Vector bias_of_count(std::int64_t count) {
  alignas(64) static const float table[32] = {
      0,          0,          0,          0,          0,          0,          0,          0,
      0,          0,          0,          0,          0,          0,          0,          0,
      -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
      -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity};
  return load<FloatType::f32>(table, count < 16 ? 16 - count : 0);
}

// Sets the scores, up to `end`, of keys that the query may not look at to -Inf. Returns the largest score, NaN aside.
template <class Mask>
inline float hide(const ScoreRow& row, std::int64_t end, const Mask& mask) {
  Vector largest = set(-kInfinity);
  std::int64_t i = 0;
  for (; i < row.limit; i += 16) {
    const std::int64_t count = row.limit - i;
    Vector score = load<FloatType::f32>(row.scores, i);
    if (Mask::kHides) score = add_bias(score, mask.bias(row.first_key + i, count));
    if (count < 16) score = add_bias(score, bias_of_count(count));
    if (Mask::kHides || count < 16) store<FloatType::f32>(row.scores, i, score);
    largest = max(score, largest);
  }
  for (; i < end; i += 16) store<FloatType::f32>(row.scores, i, set(-kInfinity));
  return largest_of(largest);
}

// Scales total and sums of the blocks before down to a new largest score.
inline void rescale(const ScoreRow& row, float largest, std::int64_t dimension) {
  const Vector factor = exp2(set(*row.largest - largest));
  *row.total *= largest_of(factor);
  for (std::int64_t d = 0; d < dimension; d += 16) {
    store<FloatType::f32>(row.sums, d, load<FloatType::f32>(row.sums, d) * factor);
  }
}

// Computes the weights of a row, as words of Products, from the row's scores; weights and scores may share their memory. Two
// passes over all rows of a tile, one for the largest scores and one for the weights, were 2 to 5 % slower.
template <class Products>
void weigh(const Attention& a, const ScoreRow& row) {
  constexpr std::int64_t kStep = 16 * Products::kPerWord;
  const std::int64_t end = (row.width + kStep - 1) / kStep * kStep;
  float largest = *row.largest;
  with_mask(a, row.mask, [&](const auto& mask) {
    const float here = hide(row, end, mask);
    if (here > largest) largest = here;
  });
  if (*row.largest > -kInfinity && largest > *row.largest) rescale(row, largest, a.dimension);
  *row.largest = largest;

  const Vector base = set(largest > -kInfinity ? largest : 0.0f);
  Vector total = set(0.0f);
  for (std::int64_t i = 0; i < end; i += kStep) {
    Vector parts[Products::kPerWord];
    OCTAVO_UNROLL for (int p = 0; p < Products::kPerWord; ++p) {
      parts[p] = Products::power(load<FloatType::f32>(row.scores, i + 16 * p) - base);
      total = total + parts[p];
    }
    store<FloatType::f32>(row.weights, i / Products::kPerWord, Products::join(parts));
  }
  *row.total += sum_of(total);
}

}  // namespace
}  // namespace octavo
