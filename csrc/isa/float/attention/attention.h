// SPDX-License-Identifier: Apache-2.0
// softmax(q k^T) v without the matrix of scores. A block of keys and values is packed once. Then each tile of queries computes
// its scores with these keys, turns them into weights and adds up weighted values, all in the L1 and L2 caches.
//
// Keys are packed as columns, in panels that are as wide as a tile: [panel][word][key]. Values are packed as
// [words][dimension], where a word holds numbers of kPerWord successive keys.
#pragma once

#include "isa/common/prefetch.h"
#include "softmax.h"

namespace octavo {
namespace {

constexpr std::int64_t kPanel = 16 * kTileVectors;

// A Products type says what is multiplied. A word holds kPerWord numbers, which follow each other in the direction that is
// summed over.
//
// FloatProducts: a word is one float.
struct FloatProducts {
  using Multiply = MultiplyFloats;
  static constexpr int kPerWord = 1;
  static Vector power(const Vector& x) { return exp2(x); }
  static Vector join(const Vector (&parts)[1]) { return parts[0]; }  // 16 words of 16 * kPerWord successive numbers
  static Vector stack(const Vector (&rows)[1]) { return rows[0]; }   // 16 words, word i of number i of each row
};

// Says what lies where in Attention::scratch.
struct Workspace {
  explicit Workspace(const Attention& a)
      : keys(a.scratch),
        values(keys + kBlockKeys * a.dimension),
        queries(values + kBlockKeys * a.dimension),
        scores(queries + kTileQueries * a.dimension),
        weights(scores + kTileQueries * kBlockKeys),
        key_scales(weights + kTileQueries * kBlockKeys),
        value_scales(key_scales + kBlockKeys),
        query_scales(value_scales + a.dimension),
        query_starts(query_scales + 16),
        sums(query_starts + 16),
        largest(sums + a.heads * padded_queries(a.queries) * a.dimension),
        total(largest + a.heads * padded_queries(a.queries)) {}

  float *keys, *values;                // for a block of keys
  float *queries, *scores, *weights;   // for a tile of queries; rows of scores and of weights are kBlockKeys apart
  float *key_scales, *value_scales;    // with codes: for each key of a block, for each dimension of all values
  float *query_scales, *query_starts;  // with codes: for each query of a tile
  float *sums, *largest, *total;       // for all rows, [head][padded query]
};

inline const char* row_of(const HeadRows& rows, std::int64_t head, std::int64_t position) {
  return static_cast<const char*>(rows.data) + head * rows.head_stride + position * rows.row_stride;
}

inline char* out_row(const Attention& a, std::int64_t head, std::int64_t query) {
  return static_cast<char*>(a.out) + head * a.out_head_stride + query * a.out_row_stride;
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// How many keys, from the first one on, a query may look at.
inline std::int64_t keys_seen(const Attention& a, std::int64_t query) {
  const std::int64_t end = a.visible + query;
  return end < 0 ? 0 : smaller(end, a.keys);
}

// 16 words of a row, from word `word` on, of numbers times `scale`. Words beyond the dimension are 0.
template <class Products, FloatType kType>
inline Vector row_words(const void* row, std::int64_t word, std::int64_t dimension, const Vector& scale) {
  Vector parts[Products::kPerWord];
  OCTAVO_UNROLL for (int p = 0; p < Products::kPerWord; ++p) {
    const std::int64_t i = word * Products::kPerWord + 16 * p;
    parts[p] = i < dimension ? load<kType>(row, i) * scale : set(0.0f);
  }
  return Products::join(parts);
}

template <class Products, FloatType kType>
void pack_keys(const Attention& a, std::int64_t first, std::int64_t count, float* packed) {
  const std::int64_t words = a.dimension / Products::kPerWord;
  for (std::int64_t key = 0; key < count; key += 16) {
    float* const column = packed + key / kPanel * kPanel * words + key % kPanel;
    for (std::int64_t word = 0; word < words; word += 16) {
      Vector rows[16];
      for (int i = 0; i < 16; ++i) {
        rows[i] = key + i < count
                      ? row_words<Products, kType>(row_of(a.k, 0, first + key + i), word, a.dimension, set(1.0f))
                      : set(0.0f);
      }
      transpose(rows);
      for (int i = 0; i < 16 && word + i < words; ++i) store<FloatType::f32>(column, (word + i) * kPanel, rows[i]);
    }
  }
}

// Returns false if a value is not finite.
template <class Products, FloatType kType>
bool pack_values(const Attention& a, std::int64_t first, std::int64_t count, float* packed) {
  Vector check = set(0.0f);  // becomes NaN at the first value that is NaN or Inf
  for (std::int64_t key = 0; key < count; key += Products::kPerWord) {
    for (std::int64_t d = 0; d < a.dimension; d += 16) {
      Vector rows[Products::kPerWord];
      OCTAVO_UNROLL for (int p = 0; p < Products::kPerWord; ++p) {
        rows[p] = key + p < count ? load<kType>(row_of(a.v, 0, first + key + p), d) : set(0.0f);
        check = multiply_add(rows[p], set(0.0f), check);
      }
      store<FloatType::f32>(packed, key / Products::kPerWord * a.dimension + d, Products::stack(rows));
    }
  }
  return sum_of(check) == 0.0f;
}

// Packs queries, multiplied by the scale. Rows beyond the last query are zeros.
template <class Products>
void pack_queries(const Attention& a, std::int64_t head, std::int64_t query, std::int64_t count, float* packed) {
  const std::int64_t words = a.dimension / Products::kPerWord;
  with_type(a.q.type, [&](auto type) {
    for (std::int64_t r = 0; r < kTileQueries; ++r) {
      for (std::int64_t word = 0; word < words; word += 16) {
        const Vector row = r < count ? row_words<Products, decltype(type)::value>(row_of(a.q, head, query + r), word,
                                                                                  a.dimension, set(a.scale))
                                     : set(0.0f);
        store<FloatType::f32>(packed, r * words + word, row, words - word);
      }
    }
  });
}

// A block of keys and values.
struct KeyBlock {
  std::int64_t first, count;
  bool finite;  // whether all values are finite
};

// `count` queries of a head, and how many keys of the current block the last one of them may look at (width).
struct QueryTile {
  std::int64_t head, query, count, width;
};

// sums += weights * values, without products whose weight is 0, because 0 times NaN or Inf is not 0.
inline void add_seen_values(const Attention& a, const Workspace& w, const QueryTile& tile, float* sums) {
  for (std::int64_t r = 0; r < tile.count; ++r) {
    for (std::int64_t key = 0; key < tile.width; ++key) {
      const float weight = w.weights[r * kBlockKeys + key];
      if (weight == 0.0f) continue;
      for (std::int64_t d = r * a.dimension, i = 0; i < a.dimension; i += 16) {
        const Vector value = load<FloatType::f32>(w.values, key * a.dimension + i);
        store<FloatType::f32>(sums, d + i, multiply_add(set(weight), value, load<FloatType::f32>(sums, d + i)));
      }
    }
  }
}

template <class Products>
void multiply_scores(const Attention& a, const Workspace& w, const QueryTile& tile) {
  const std::int64_t words = a.dimension / Products::kPerWord;
  for (std::int64_t key = 0; key < tile.width; key += kPanel) {
    const std::int64_t left = tile.width - key, vectors = left < kPanel ? (left + 15) / 16 : kTileVectors;
    multiply_columns<typename Products::Multiply>(
        {w.queries, words, w.keys + key * words, kPanel, words, w.scores + key, kBlockKeys}, NewSums{}, tile.count,
        vectors);
  }
}

template <class Products>
void add_values(const Attention& a, const Workspace& w, const QueryTile& tile, float* sums) {
  const std::int64_t depth = (tile.width + Products::kPerWord - 1) / Products::kPerWord;
  for (std::int64_t d = 0; d < a.dimension; d += kPanel) {
    const std::int64_t left = a.dimension - d, vectors = left < kPanel ? left / 16 : kTileVectors;
    multiply_columns<typename Products::Multiply>(
        {w.weights, kBlockKeys, w.values + d, a.dimension, depth, sums + d, a.dimension}, MoreSums{}, tile.count,
        vectors);
  }
}

inline std::int64_t first_row(const Attention& a, const QueryTile& tile) {
  return tile.head * padded_queries(a.queries) + tile.query;
}

inline float* sums_of(const Attention& a, const Workspace& w, const QueryTile& tile) {
  return w.sums + first_row(a, tile) * a.dimension;
}

template <class Products>
void weigh_rows(const Attention& a, const Workspace& w, std::int64_t first_key, const QueryTile& tile) {
  for (std::int64_t r = 0; r < tile.count; ++r) {
    const std::int64_t query = tile.query + r, row = first_row(a, tile) + r, limit = keys_seen(a, query) - first_key;
    weigh<Products>(
        a, {w.scores + r * kBlockKeys, tile.width, smaller(limit, tile.width), row_of(a.mask, tile.head, query),
            first_key, w.weights + r * kBlockKeys, w.sums + row * a.dimension, w.largest + row, w.total + row});
  }
}

template <class Products>
void attend_tile(const Attention& a, const Workspace& w, const KeyBlock& block, const QueryTile& tile) {
  pack_queries<Products>(a, tile.head, tile.query, tile.count, w.queries);
  multiply_scores<Products>(a, w, tile);
  weigh_rows<Products>(a, w, block.first, tile);
  float* const sums = sums_of(a, w, tile);
  block.finite ? add_values<Products>(a, w, tile, sums) : add_seen_values(a, w, tile, sums);
}

// The state of some queries before they have seen a key.
inline void clear_rows(const Attention& a, const Workspace& w, std::int64_t head, std::int64_t query,
                       std::int64_t count) {
  const std::int64_t first = head * padded_queries(a.queries) + query;
  for (std::int64_t i = 0; i < count * a.dimension; i += 16) {
    store<FloatType::f32>(w.sums, first * a.dimension + i, set(0.0f));
  }
  for (std::int64_t row = first; row < first + count; ++row) {
    w.largest[row] = -kInfinity;
    w.total[row] = 0.0f;
  }
}

// Writes sums / total, or zeros for a row that has seen no key.
inline void write_rows(const Attention& a, const Workspace& w, std::int64_t head, std::int64_t query,
                       std::int64_t count) {
  with_type(a.q.type, [&](auto type) {
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t row = head * padded_queries(a.queries) + query + r;
      const Vector inverse = set(w.total[row] == 0.0f ? 0.0f : 1.0f / w.total[row]);
      char* const out = out_row(a, head, query + r);
      for (std::int64_t d = 0; d < a.dimension; d += 16) {
        const Vector sum = load<FloatType::f32>(w.sums, row * a.dimension + d);
        store<decltype(type)::value>(out, d, sum * inverse);
      }
    }
  });
}

// Prefetches rows that the next unit of work will read and write, while this unit computes. The rows lie apart, so that no CPU
// prefetches them by itself. This gains 15 to 20 % at 8 x 12 heads x 128 x 32, where tensors are larger than the L2 cache.
// Prefetching only what will be read gained nothing, only what will be written 4 %, and this unit's own outputs 2 % (Zen 4).
inline void prefetch_next(const Attention& a, std::int64_t head, std::int64_t first, std::int64_t count) {
  if (a.next == nullptr || first >= kBlockKeys) return;
  const auto fetch = [&](const HeadRows& rows, std::int64_t head, std::int64_t i) {
    const char* const row = row_of(rows, head, i);
    for (std::int64_t byte = 0; byte < a.dimension * bytes_of(rows.type); byte += 64)
      __builtin_prefetch(row + byte, 0, 2);
  };
  for (std::int64_t i = first; i < first + count; ++i) {
    if (i < a.next->queries) {
      fetch(a.next->q, head, i);
      const char* const row = out_row(*a.next, head, i);
      for (std::int64_t byte = 0; byte < a.dimension * bytes_of(a.q.type); byte += 64) prefetch_to_write(row + byte);
    }
    if (head == 0 && i < a.keys) {
      fetch(a.next->k, 0, i);
      fetch(a.next->v, 0, i);
    }
  }
}

// Calls f(tile) for each tile of queries that may look at a key of this block. Before its first block, the state of a tile is
// cleared; after its last block, its outputs are written.
template <class F>
void for_each_query_tile(const Attention& a, const Workspace& w, std::int64_t first, std::int64_t count, const F& f) {
  for (std::int64_t head = 0; head < a.heads; ++head) {
    for (std::int64_t query = 0; query < a.queries; query += kTileQueries) {
      const std::int64_t queries = smaller(a.queries - query, kTileQueries);
      const std::int64_t limit = keys_seen(a, query + queries - 1), seen = limit - first;
      if (first == 0) {
        prefetch_next(a, head, query, queries);
        clear_rows(a, w, head, query, queries);
      }
      if (seen > 0) f(QueryTile{head, query, queries, smaller(seen, count)});
      const bool is_last = seen <= kBlockKeys && (seen > 0 || first == 0);
      if (is_last) write_rows(a, w, head, query, queries);
    }
  }
}

// All queries look at one block of keys. If a value is not finite, the block is computed in float32.
template <class Products>
void attend_block(const Attention& a, const Workspace& w, std::int64_t first, std::int64_t count) {
  with_type(a.k.type, [&](auto type) { pack_keys<Products, decltype(type)::value>(a, first, count, w.keys); });
  bool finite = false;
  with_type(a.v.type,
            [&](auto type) { finite = pack_values<Products, decltype(type)::value>(a, first, count, w.values); });
  if (!finite && Products::kPerWord > 1) return attend_block<FloatProducts>(a, w, first, count);
  for_each_query_tile(a, w, first, count,
                      [&](const QueryTile& tile) { attend_tile<Products>(a, w, {first, count, finite}, tile); });
}

// Calls f(first, count) for each block of keys that some query may look at.
template <class F>
void for_each_key_block(const Attention& a, const F& f) {
  const std::int64_t end = keys_seen(a, a.queries - 1);
  std::int64_t first = 0;
  do {  // at least once, because zeros are written where there are no keys
    f(first, smaller(end - first, kBlockKeys));
    first += kBlockKeys;
  } while (first < end);
}

template <class Products>
void attend(const Attention& a) {
  const Workspace w(a);
  for_each_key_block(a, [&](std::int64_t first, std::int64_t count) { attend_block<Products>(a, w, first, count); });
}

inline void attention(const Attention& a) { attend<FloatProducts>(a); }

}  // namespace
}  // namespace octavo
