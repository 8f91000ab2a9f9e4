// SPDX-License-Identifier: Apache-2.0
// Attention with exact products of 8-bit codes. Each query and each key has a scale, and so has each dimension of all values.
// Weights are multiples of 1 / 255 of the largest weight. docs/numerics.md, eq. 54 to 57.
//
// The template parameter Words is the CodeWords of codes_scalar.h, codes_avx2.h or codes_avx512_vnni.h: it says how many codes
// a word holds and which instruction multiplies them.
#pragma once

#include "attention.h"

namespace octavo {
namespace {

// Weights as codes 0 .. 255. Their total is the sum of the codes, so that the weights of a row add up to 1 whatever rounding
// has taken from them.
template <class Words>
struct CodeProducts {
  static constexpr int kPerWord = Words::kPerWord;
  static Vector power(const Vector& x) { return round_half_even(exp2_coarse(x) * set(255.0f)); }
  static Vector join(const Vector (&parts)[kPerWord]) { return Words::unsigned_words(parts); }
};

// Turns int32 sums into scores. If keys have an offset, sums start from the number that cancels it.
template <class Words>
struct Scores {
  const float *starts, *query_scales, *key_scales;
  Vector start(const WordProduct&, int r, int) const { return set(starts[r]); }
  Vector end(const WordProduct&, int r, int v, const Vector& acc) const {
    return Words::reals(acc) * set(query_scales[r]) * load<FloatType::f32>(key_scales, 16 * v);
  }
  Scores after(int rows) const { return {starts + rows, query_scales + rows, key_scales}; }
};

// Adds the int32 sums of a block, which are at most 256 * 255 * 127 < 2^24, to the float sums of the blocks before.
template <class Words>
struct ScaledSums {
  const float* value_scales;
  Vector start(const WordProduct&, int, int) const { return set(0.0f); }
  Vector end(const WordProduct& t, int r, int v, const Vector& acc) const {
    const Vector scale = load<FloatType::f32>(value_scales, 16 * v);
    return multiply_add(Words::reals(acc), scale, load<FloatType::f32>(t.c, r * t.c_stride + 16 * v));
  }
  ScaledSums after(int) const { return *this; }
};

// The scales of 16 rows whose largest magnitudes are given, by eq. 2. The scale is NaN where the magnitude is not finite.
inline void scales_of(const Vector& largest, float* scales) {
  float values[16];
  store<FloatType::f32>(values, 0, largest);
  for (int i = 0; i < 16; ++i) {
    const float scale = values[i] < kInfinity ? values[i] / 127.0f : __builtin_nanf("");
    scales[i] = scale < 0x1p-126f ? 1.0f : scale;
  }
}

// Calls f(begin, end, d) for 16 elements of some rows, then for the next 16 elements of these rows, then for the next rows.
// Going down a column of all rows was 2 to 5 % slower: rows that lie far apart need a TLB entry each and share few sets of the
// L1 cache.
template <class F>
inline void for_near_rows(const Attention& a, std::int64_t count, const F& f) {
  constexpr std::int64_t kNearRows = 16;
  for (std::int64_t begin = 0; begin < count; begin += kNearRows) {
    const std::int64_t end = smaller(begin + kNearRows, count);
    for (std::int64_t d = 0; d < a.dimension; d += 16) f(begin, end, d);
  }
}

// The scales of up to 16 rows after multiplying them by `factor`. Missing rows have the scale 1.
template <FloatType kType>
void row_scales(const HeadRows& rows, std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t dimension,
                const Vector& factor, float* scales) {
  Vector largest[16];
  for (int r = 0; r < 16; ++r) {
    const char* const row = row_of(rows, head, first + r);
    Vector most = set(0.0f);
    for (std::int64_t d = 0; d < dimension && r < count; d += 16) {
      most = max_magnitude(most, abs(load<kType>(row, d) * factor));
    }
    largest[r] = most;
  }
  transpose(largest);
  for (int r = 1; r < 16; ++r) largest[0] = max_magnitude(largest[0], largest[r]);
  scales_of(largest[0], scales);
}

// 16 words of a row, from word `word` on, of codes by eq. 4. Words beyond the dimension are 0.
template <class Words, FloatType kType>
Vector row_codes(const void* row, std::int64_t word, std::int64_t dimension, const Vector& factor,
                 const Vector& inverse) {
  Vector parts[Words::kPerWord];
  OCTAVO_UNROLL for (int p = 0; p < Words::kPerWord; ++p) {
    const std::int64_t i = word * Words::kPerWord + 16 * p;
    parts[p] = i < dimension ? load<kType>(row, i) * factor * inverse : set(0.0f);
  }
  return Words::signed_words(parts);
}

template <class Words, FloatType kType>
void pack_key_codes(const Attention& a, std::int64_t first, std::int64_t count, const Workspace& w) {
  const std::int64_t words = a.dimension / Words::kPerWord;
  for (std::int64_t key = 0; key < count; key += 16) {
    row_scales<kType>(a.k, 0, first + key, count - key, a.dimension, set(1.0f), w.key_scales + key);
    float* const column = w.keys + key / kPanel * kPanel * words + key % kPanel;
    for (std::int64_t word = 0; word < words; word += 16) {
      Vector rows[16];
      for (int i = 0; i < 16; ++i) {
        const Vector inverse = set(1.0f / w.key_scales[key + i]);
        rows[i] = key + i < count ? Words::as_keys(row_codes<Words, kType>(row_of(a.k, 0, first + key + i), word,
                                                                           a.dimension, set(1.0f), inverse))
                                  : set(0.0f);
      }
      transpose(rows);
      for (int i = 0; i < 16 && word + i < words; ++i) store<FloatType::f32>(column, (word + i) * kPanel, rows[i]);
    }
  }
}

template <class Words, FloatType kType>
void pack_value_codes(const Attention& a, std::int64_t first, std::int64_t count, const Workspace& w) {
  for_near_rows(a, count, [&](std::int64_t begin, std::int64_t end, std::int64_t d) {
    const Vector inverse = set(1.0f) / load<FloatType::f32>(w.value_scales, d);
    for (std::int64_t key = begin; key < end; key += Words::kPerWord) {
      Vector rows[Words::kPerWord];
      OCTAVO_UNROLL for (int p = 0; p < Words::kPerWord; ++p) {
        rows[p] = key + p < end ? load<kType>(row_of(a.v, 0, first + key + p), d) * inverse : set(0.0f);
      }
      store<FloatType::f32>(w.values, key / Words::kPerWord * a.dimension + d, Words::stack(rows));
    }
  });
}

// Packs queries, multiplied by the scale, as codes. Rows lie a.dimension words apart; rows beyond the last query are zeros.
template <class Words, FloatType kType>
void pack_query_codes(const Attention& a, const QueryTile& tile, const Workspace& w) {
  const Vector factor = set(a.scale);
  row_scales<kType>(a.q, tile.head, tile.query, tile.count, a.dimension, factor, w.query_scales);
  for (std::int64_t r = 0; r < kTileQueries; ++r) {
    const Vector inverse = set(1.0f / w.query_scales[r]);
    Vector offset = set(0.0f);  // the sum of products with a key whose codes are 0
    for (std::int64_t word = 0; word * Words::kPerWord < a.dimension; word += 16) {
      const Vector codes = r < tile.count ? row_codes<Words, kType>(row_of(a.q, tile.head, tile.query + r), word,
                                                                    a.dimension, factor, inverse)
                                          : set(0.0f);
      store<FloatType::f32>(w.queries, r * a.dimension + word, codes);
      Words::MultiplyKeys::add(offset, codes, Words::key_offset());
    }
    const auto start = static_cast<std::int32_t>(-sum_of(Words::reals(offset)));
    __builtin_memcpy(w.query_starts + r, &start, sizeof start);
  }
}

template <class Words>
void multiply_score_codes(const Attention& a, const Workspace& w, const QueryTile& tile) {
  const std::int64_t words = a.dimension / Words::kPerWord;
  for (std::int64_t key = 0; key < tile.width; key += kPanel) {
    const std::int64_t left = tile.width - key, vectors = left < kPanel ? (left + 15) / 16 : kTileVectors;
    multiply_columns<typename Words::MultiplyKeys>(
        {w.queries, a.dimension, w.keys + key * words, kPanel, words, w.scores + key, kBlockKeys},
        Scores<Words>{w.query_starts, w.query_scales, w.key_scales + key}, tile.count, vectors);
  }
}

template <class Words>
void add_value_codes(const Attention& a, const Workspace& w, const QueryTile& tile) {
  const std::int64_t depth = (tile.width + Words::kPerWord - 1) / Words::kPerWord;
  for (std::int64_t d = 0; d < a.dimension; d += kPanel) {
    const std::int64_t left = a.dimension - d, vectors = left < kPanel ? left / 16 : kTileVectors;
    multiply_columns<typename Words::MultiplyWeights>(
        {w.weights, kBlockKeys, w.values + d, a.dimension, depth, sums_of(a, w, tile) + d, a.dimension},
        ScaledSums<Words>{w.value_scales + d}, tile.count, vectors);
  }
}

// All values count, whether a query sees them or not, so that the scales, and therefore the bits, do not depend on how queries
// and keys are cut. Returns false if a value is not finite.
inline bool choose_value_scales(const Attention& a, float* scales) {
  for (std::int64_t d = 0; d < a.dimension; d += 16) store<FloatType::f32>(scales, d, set(0.0f));
  with_type(a.v.type, [&](auto type) {
    for_near_rows(a, a.keys, [&](std::int64_t begin, std::int64_t end, std::int64_t d) {
      Vector largest = load<FloatType::f32>(scales, d);
      for (std::int64_t key = begin; key < end; ++key) {
        largest = max_magnitude(largest, abs(load<decltype(type)::value>(row_of(a.v, 0, key), d)));
      }
      store<FloatType::f32>(scales, d, largest);
    });
  });
  bool finite = true;
  for (std::int64_t d = 0; d < a.dimension; d += 16) {
    scales_of(load<FloatType::f32>(scales, d), scales + d);
    for (std::int64_t i = d; i < d + 16; ++i) finite = finite && scales[i] < kInfinity;
  }
  return finite;
}

// A head with a value that is not finite is computed in float32.
template <class Words>
void attention_int8(const Attention& a) {
  const Workspace w(a);
  if (!choose_value_scales(a, w.value_scales)) return attend<FloatProducts>(a);
  for_each_key_block(a, [&](std::int64_t first, std::int64_t count) {
    with_type(a.k.type, [&](auto type) { pack_key_codes<Words, decltype(type)::value>(a, first, count, w); });
    with_type(a.v.type, [&](auto type) { pack_value_codes<Words, decltype(type)::value>(a, first, count, w); });
    for_each_query_tile(a, w, first, count, [&](const QueryTile& tile) {
      with_type(a.q.type, [&](auto type) { pack_query_codes<Words, decltype(type)::value>(a, tile, w); });
      multiply_score_codes<Words>(a, w, tile);
      weigh_rows<CodeProducts<Words>>(a, w, first, tile);
      add_value_codes<Words>(a, w, tile);
    });
  });
}

}  // namespace
}  // namespace octavo
