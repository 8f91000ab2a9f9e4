// SPDX-License-Identifier: Apache-2.0
// Attention of few queries, as in decoding. Each key and each value is read once and is not packed, so that the speed of memory
// is the limit.
#pragma once

#include "attention.h"

namespace octavo {
namespace {

template <int kVectors>
struct Width {
  static constexpr int vectors = kVectors;
};

// Calls f(Width<dimension / 16>).
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

// Adds weights * values to a row, without products whose weight is 0, so that hidden values may be NaN or Inf.
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

// All rows look at so many keys before the next keys are read: these keys stay in the L1 cache.
constexpr std::int64_t kNearKeys = 32;

// The rows of a unit of work. A row is one query of one head; place_of says where the workspace keeps a row's sums.
class FewRows {
 public:
  FewRows(const Attention& a, const Workspace& w) : a_(a), w_(w) {
    for (std::int64_t row = 0; row < a.heads * a.queries; ++row) {
      with_type(a.q.type, [&](auto type) {
        for (std::int64_t d = 0; d < a.dimension; d += 16) {
          const Vector q = load<decltype(type)::value>(row_of(a.q, row / a.queries, row % a.queries), d);
          store<FloatType::f32>(w.queries, row * a.dimension + d, q * set(a.scale));
        }
      });
    }
  }

  template <int kVectors>
  void attend_block(std::int64_t first) const {
    const std::int64_t end = first + smaller(a_.keys - first, kBlockKeys);
    for_near_keys(first, end, [&](std::int64_t row, std::int64_t key, std::int64_t count) {
      with_type(a_.k.type, [&](auto type) {
        score_keys<decltype(type)::value, kVectors>(a_.k, key, count, w_.queries + row * a_.dimension,
                                                    w_.scores + row * kBlockKeys + key - first);
      });
    });
    for (std::int64_t row = 0; row < a_.heads * a_.queries; ++row) {
      const std::int64_t count = seen(row, first, end);
      if (count == 0) continue;
      const std::int64_t head = row / a_.queries, query = row % a_.queries, place = place_of(row);
      weigh<FloatProducts>(
          a_, {w_.scores + row * kBlockKeys, count, count, row_of(a_.mask, head, query), first,
               w_.weights + row * kBlockKeys, w_.sums + place * a_.dimension, w_.largest + place, w_.total + place});
    }
    for_near_keys(first, end, [&](std::int64_t row, std::int64_t key, std::int64_t count) {
      with_type(a_.v.type, [&](auto type) {
        add_weighted<decltype(type)::value, kVectors>(a_.v, key, count, w_.weights + row * kBlockKeys + key - first,
                                                      w_.sums + place_of(row) * a_.dimension);
      });
    });
  }

 private:
  std::int64_t place_of(std::int64_t row) const {
    return row / a_.queries * padded_queries(a_.queries) + row % a_.queries;
  }

  // How many of the keys [first, end) a row may look at.
  std::int64_t seen(std::int64_t row, std::int64_t first, std::int64_t end) const {
    const std::int64_t limit = keys_seen(a_, row % a_.queries);
    return limit <= first ? 0 : smaller(limit, end) - first;
  }

  // Calls f(row, key, count) for every row and the `count` keys from `key` on, then for every row and the next keys.
  template <class F>
  void for_near_keys(std::int64_t first, std::int64_t end, const F& f) const {
    for (std::int64_t key = first; key < end; key += kNearKeys) {
      for (std::int64_t row = 0; row < a_.heads * a_.queries; ++row) {
        const std::int64_t count = seen(row, key, smaller(end, key + kNearKeys));
        if (count > 0) f(row, key, count);
      }
    }
  }

  const Attention& a_;
  const Workspace& w_;
};

inline void attention_few(const Attention& a) {
  const Workspace w(a);
  const FewRows rows(a, w);
  for (std::int64_t head = 0; head < a.heads; ++head) clear_rows(a, w, head, 0, a.queries);
  with_width(a.dimension, [&](auto width) {
    for (std::int64_t first = 0; first < a.keys; first += kBlockKeys) {
      rows.template attend_block<decltype(width)::vectors>(first);
    }
  });
  for (std::int64_t head = 0; head < a.heads; ++head) write_rows(a, w, head, 0, a.queries);
}

}  // namespace
}  // namespace octavo
