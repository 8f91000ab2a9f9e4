// SPDX-License-Identifier: Apache-2.0
// Attention of few queries, as in decoding: each key and value is read once, where it lies, and memory sets the pace.
#pragma once

#include "attention.h"

namespace octavo {
namespace {

template <int kVectors>
struct Width {
  static constexpr int vectors = kVectors;
};

// f(Width<dimension / 16>)
template <class F, int kVectors = 8>
inline void with_width(std::int64_t dimension, const F& f) {
  if constexpr (kVectors > 1) {
    if (dimension < 16 * kVectors) return with_width<F, kVectors - 1>(dimension, f);
  }
  f(Width<kVectors>{});
}

template <FloatType kType, int kVectors>
void score_keys(const HeadRows& k, std::int64_t first, std::int64_t count, const float* query, float* scores) {
  Vector q[kVectors];
  OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) q[v] = load<FloatType::f32>(query, 16 * v);
  for (std::int64_t i = 0; i < count; ++i) {
    const char* const key = row_of(k, 0, first + i);
    Vector products = load<kType>(key, 0) * q[0];
    OCTAVO_UNROLL for (int v = 1; v < kVectors; ++v) products = multiply_add(load<kType>(key, 16 * v), q[v], products);
    scores[i] = sum_of(products);
  }
}

// Without the products of weights 0, so that hidden values may be NaN or Inf.
template <FloatType kType, int kVectors>
void add_weighted(const HeadRows& v, std::int64_t first, std::int64_t count, const float* weights, float* row) {
  Vector sums[kVectors];
  OCTAVO_UNROLL for (int i = 0; i < kVectors; ++i) sums[i] = load<FloatType::f32>(row, 16 * i);
  for (std::int64_t key = 0; key < count; ++key) {
    if (weights[key] == 0.0f) continue;
    const char* const value = row_of(v, 0, first + key);
    const Vector weight = set(weights[key]);
    OCTAVO_UNROLL for (int i = 0; i < kVectors; ++i) sums[i] =
        multiply_add(weight, load<kType>(value, 16 * i), sums[i]);
  }
  OCTAVO_UNROLL for (int i = 0; i < kVectors; ++i) store<FloatType::f32>(row, 16 * i, sums[i]);
}

// Row r of the workspace: all queries of one head after the other, as in attention.h.
template <int kVectors>
void attend_row(const Attention& a, const Workspace& w, std::int64_t head, std::int64_t query, std::int64_t first) {
  const std::int64_t limit = limit_of(a, query) - first, count = limit < kBlockKeys ? limit : kBlockKeys;
  if (count <= 0) return;
  const std::int64_t row = head * padded_queries(a.queries) + query;
  with_type(a.q.type, [&](auto type) {
    for (std::int64_t d = 0; d < a.dimension; d += 16) {
      const Vector q = load<decltype(type)::value>(row_of(a.q, head, query), d);
      store<FloatType::f32>(w.queries, d, q * set(a.scale));
    }
  });
  with_type(a.k.type,
            [&](auto type) { score_keys<decltype(type)::value, kVectors>(a.k, first, count, w.queries, w.scores); });
  float* const sums = w.sums + row * a.dimension;
  weigh<FloatProducts>(
      a, {w.scores, count, count, row_of(a.mask, head, query), first, w.weights, sums, w.largest + row, w.total + row});
  with_type(a.v.type,
            [&](auto type) { add_weighted<decltype(type)::value, kVectors>(a.v, first, count, w.weights, sums); });
}

inline void attention_few(const Attention& a) {
  const Workspace w(a);
  clear_rows(a, w);
  with_width(a.dimension, [&](auto width) {
    for (std::int64_t first = 0; first < a.keys; first += kBlockKeys) {
      for (std::int64_t head = 0; head < a.heads; ++head) {
        for (std::int64_t query = 0; query < a.queries; ++query) {
          attend_row<decltype(width)::vectors>(a, w, head, query, first);
        }
      }
    }
  });
  write_rows(a, w);
}

}  // namespace
}  // namespace octavo
