// SPDX-License-Identifier: Apache-2.0
// What products of float matrices need beyond a Vector: accumulators that stay in registers, transposed tiles, masks.
#pragma once

#include "isa/float/vector/vector.h"

#if defined(__AVX512F__)
#include "tile_avx512.h"
#elif defined(__AVX2__)
#include "tile_avx2.h"
#else
#include "tile_scalar.h"
#endif

namespace octavo {
namespace {

constexpr float kInfinity = __builtin_inff();

// c[rows][columns] = a[rows][depth] b[depth][columns]. The elements of a and b are words of 4 bytes, whose contents one
// instruction multiplies: a float, two bfloat16, or two or four codes. Strides count words. A tile of c has 16 * kVectors
// columns.
struct WordProduct {
  const float* a;
  std::int64_t a_stride;
  const float* b;
  std::int64_t b_stride;
  std::int64_t depth;
  float* c;
  std::int64_t c_stride;
};

// A Sums type says what the accumulator of c[r][16 v ...] starts from (start), and what is written there in the end (end).
// after(rows) gives the Sums of the rows that follow the first `rows`.
//
// NewSums: c = a b.
struct NewSums {
  Vector start(const WordProduct&, int, int) const { return set(0.0f); }
  Vector end(const WordProduct&, int, int, const Vector& acc) const { return acc; }
  NewSums after(int) const { return *this; }
};

// MoreSums: c = c + a b.
struct MoreSums {
  Vector start(const WordProduct& t, int r, int v) const { return load<FloatType::f32>(t.c, r * t.c_stride + 16 * v); }
  Vector end(const WordProduct&, int, int, const Vector& acc) const { return acc; }
  MoreSums after(int) const { return *this; }
};

// acc += a * b, rounded once for each product.
struct MultiplyFloats {
  static void add(Vector& acc, const Vector& a, const Vector& b) { add_product(acc, a, b); }
};

// Multiplies one tile. In every tile an output is one chain of sums in the order of depth, so that the place of a row does not
// change its bits.
template <class Multiply, class Sums, int kRows, int kVectors>
void multiply_tile(const WordProduct& t, const Sums& sums) {
  Vector acc[kRows][kVectors];
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = sums.start(t, r, v);
  }
  const float* b = t.b;
  for (std::int64_t i = 0; i < t.depth; ++i, b += t.b_stride) {
    Vector columns[kVectors];
    OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) columns[v] = load<FloatType::f32>(b, 16 * v);
    OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector row = set(t.a[r * t.a_stride + i]);
      OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) Multiply::add(acc[r][v], row, columns[v]);
    }
  }
  OCTAVO_UNROLL for (int r = 0; r < kRows; ++r) {
    OCTAVO_UNROLL for (int v = 0; v < kVectors; ++v) {
      store<FloatType::f32>(t.c, r * t.c_stride + 16 * v, sums.end(t, r, v, acc[r][v]));
    }
  }
}

// Multiplies the tiles of up to kTileQueries rows. The last tile is computed whole, beyond the last one of `rows` as well.
template <class Multiply, class Sums, int kVectors>
void multiply_rows(WordProduct t, Sums sums, std::int64_t rows) {
  constexpr int kRows = tile_rows(kVectors);
  for (std::int64_t r = 0; r < rows; r += kRows) {
    multiply_tile<Multiply, Sums, kRows, kVectors>(t, sums);
    t.a += kRows * t.a_stride;
    t.c += kRows * t.c_stride;
    sums = sums.after(kRows);
  }
}

// multiply_rows for a width that is known at run time only, 1 to kTileVectors vectors.
template <class Multiply, class Sums, int kVectors = kTileVectors>
void multiply_columns(const WordProduct& t, const Sums& sums, std::int64_t rows, std::int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return multiply_columns<Multiply, Sums, kVectors - 1>(t, sums, rows, vectors);
  }
  multiply_rows<Multiply, Sums, kVectors>(t, sums, rows);
}

}  // namespace
}  // namespace octavo
