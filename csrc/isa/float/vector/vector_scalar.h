// SPDX-License-Identifier: Apache-2.0
// 16 floats in an array: the executable definition of what a Vector does.
#pragma once

#include <cmath>

#include "contract/float_kernel.h"
#include "isa/common/half.h"

namespace octavo {
namespace {

struct Vector {
  float lanes[16];
};

// A Vector whose lane i is f(i).
template <class F>
inline Vector each(const F& f) {
  Vector out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = f(i);
  return out;
}

inline Vector set(float value) {
  return each([&](int) { return value; });
}
inline Vector operator+(const Vector& a, const Vector& b) {
  return each([&](int i) { return a.lanes[i] + b.lanes[i]; });
}
inline Vector operator-(const Vector& a, const Vector& b) {
  return each([&](int i) { return a.lanes[i] - b.lanes[i]; });
}
inline Vector operator*(const Vector& a, const Vector& b) {
  return each([&](int i) { return a.lanes[i] * b.lanes[i]; });
}
inline Vector operator/(const Vector& a, const Vector& b) {
  return each([&](int i) { return a.lanes[i] / b.lanes[i]; });
}

// a * b + c, and c - a * b, each rounded once.
inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
  return each([&](int i) { return std::fma(a.lanes[i], b.lanes[i], c.lanes[i]); });
}
inline Vector subtract_product(const Vector& c, const Vector& a, const Vector& b) {
  return each([&](int i) { return std::fma(-a.lanes[i], b.lanes[i], c.lanes[i]); });
}

// Where a or b is NaN, the result is b, as the instructions of other instruction sets have it.
inline Vector max(const Vector& a, const Vector& b) {
  return each([&](int i) { return a.lanes[i] > b.lanes[i] ? a.lanes[i] : b.lanes[i]; });
}
inline Vector min(const Vector& a, const Vector& b) {
  return each([&](int i) { return a.lanes[i] < b.lanes[i] ? a.lanes[i] : b.lanes[i]; });
}
inline Vector abs(const Vector& a) {
  return each([&](int i) { return std::fabs(a.lanes[i]); });
}
// The larger one of a and b, neither of which is negative. NaN is larger than every number.
inline Vector max_magnitude(const Vector& a, const Vector& b) {
  return each([&](int i) { return bits_of(a.lanes[i]) > bits_of(b.lanes[i]) ? a.lanes[i] : b.lanes[i]; });
}
inline Vector sqrt(const Vector& a) {
  return each([&](int i) { return std::sqrt(a.lanes[i]); });
}
inline Vector round_half_even(const Vector& a) {
  return each([&](int i) { return std::nearbyint(a.lanes[i]); });
}

// a * 2^n for a whole number n. The result is 0 or Inf beyond the exponents of float32.
inline Vector scale_by_power(const Vector& a, const Vector& n) {
  const auto exponent = [](float n) { return n > 252.0f ? 252 : n > -252.0f ? static_cast<int>(n) : -252; };
  return each([&](int i) { return std::ldexp(a.lanes[i], exponent(n.lanes[i])); });
}

// table[index] for whole numbers 0 .. 15.
inline Vector lookup(const float (&table)[16], const Vector& index) {
  return each([&](int i) { return table[static_cast<int>(index.lanes[i])]; });
}

// The first `count` lanes of a, and 0 in the other lanes.
inline Vector keep(const Vector& a, std::int64_t count) {
  return each([&](int i) { return i < count ? a.lanes[i] : 0.0f; });
}

// Adds lanes that are 8 apart, then 4, 2 and 1.
inline float sum_of(Vector a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.lanes[i] += a.lanes[i + half];
  }
  return a.lanes[0];
}

inline float largest_of(const Vector& a) {
  float largest = a.lanes[0];
  for (const float lane : a.lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// The first `count` of 16 values from x[i] on, all of them if count is above 16, and 0 in the other lanes.
template <FloatType kType>
inline Vector load(const void* x, std::int64_t i, std::int64_t count = 16) {
  return each([&](int lane) { return lane < count ? load_float(x, kType, i + lane) : 0.0f; });
}

// 16 adjacent bf16 or f16.
template <FloatType kType>
inline Vector widen(const std::uint16_t* halves) {
  return load<kType>(halves, 0);
}

template <FloatType kType>
inline void store(void* out, std::int64_t i, const Vector& a, std::int64_t count = 16) {
  for (int lane = 0; lane < 16 && lane < count; ++lane) store_float(out, kType, i + lane, a.lanes[lane]);
}

}  // namespace
}  // namespace octavo
