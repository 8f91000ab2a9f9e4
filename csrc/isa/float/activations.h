// SPDX-License-Identifier: Apache-2.0
// Activation functions over a Vector, with the same bits on every instruction set. NaN stays NaN. docs/numerics.md has the
// formulas and the bounds of their errors.
#pragma once

#include "gelu_table.h"
#include "isa/float/vector/exp.h"

namespace octavo {
namespace {

constexpr float kLog2E = 1.44269504f;

struct Same {
  Vector operator()(const Vector& x) const { return x; }
};

struct Relu {
  Vector operator()(const Vector& x) const { return max(set(0.0f), x); }
};

// max(x, 0) - |x| Phi(-|x|), with Phi from a table of quintics. This takes 1/3 of the time of exp2 and a division, on AVX2 as
// well.
struct Gelu {
  Vector operator()(const Vector& x) const {
    const Vector a = min(abs(x), set(15 * kGeluWidth));
    const Vector i = round_half_even(a * set(1 / kGeluWidth));
    const Vector r = subtract_product(a, i, set(kGeluWidth));  // exact
    Vector tail = lookup(kGeluTable[5], i);
    for (int power = 4; power >= 0; --power) tail = multiply_add(tail, r, lookup(kGeluTable[power], i));
    return subtract_product(max(set(0.0f), x), a, tail);
  }
};

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). x is limited to -11, where exp2 is Inf already, so that -Inf
// gives 0.
struct GeluTanh {
  Vector operator()(const Vector& any) const {
    constexpr float kSlope = -2 * kLog2E * 0.797884561f;
    const Vector x = max(set(-11.0f), any);
    const Vector z = x * multiply_add(x * x, set(kSlope * 0.044715f), set(kSlope));
    return x / (set(1.0f) + exp2(z));
  }
};

// x / (1 + exp(-x)). x is limited to -100, where exp2 is Inf already, so that -Inf gives 0.
struct Silu {
  Vector operator()(const Vector& any) const {
    const Vector x = max(set(-100.0f), any);
    return x / (set(1.0f) + exp2(x * set(-kLog2E)));
  }
};

// Here and below the arguments are copied, so that the compiler knows that no store changes them.
template <FloatType kFrom, FloatType kTo, class F>
void activate_rows(const Activate& all, const F& f) {
  const Activate a = all;
  for (std::int64_t row = 0; row < a.rows; ++row) {
    const std::int64_t from = row * a.x_stride, to = row * a.out_stride;
    each_vector(a.columns, [&](std::int64_t i, std::int64_t lanes) {
      Vector x = load<kFrom>(a.x, from + i, lanes);
      if (a.bias) x = x + load<FloatType::f32>(a.bias, i, lanes);
      store<kTo>(a.out, to + i, f(x), lanes);
    });
  }
}

template <class F>
void activate_with(const Activate& a, const F& f) {
  with_type(a.x_type, [&](auto from) {
    with_type(a.type, [&](auto to) { activate_rows<decltype(from)::value, decltype(to)::value>(a, f); });
  });
}

inline void activate(const Activate& a) {
  switch (a.activation) {
    case Activation::relu: return activate_with(a, Relu{});
    case Activation::gelu: return activate_with(a, Gelu{});
    case Activation::gelu_tanh: return activate_with(a, GeluTanh{});
    case Activation::silu: return activate_with(a, Silu{});
    default: return activate_with(a, Same{});
  }
}

template <FloatType kType>
void silu_mul_rows(const SiluMul& all) {
  const SiluMul m = all;
  for (std::int64_t row = 0; row < m.rows; ++row) {
    each_vector(m.columns, [&](std::int64_t i, std::int64_t lanes) {
      const Vector silu = Silu{}(load<kType>(m.gate, row * m.gate_stride + i, lanes));
      store<kType>(m.out, row * m.out_stride + i, silu * load<kType>(m.up, row * m.up_stride + i, lanes), lanes);
    });
  }
}

inline void silu_mul(const SiluMul& m) {
  with_type(m.type, [&](auto type) { silu_mul_rows<decltype(type)::value>(m); });
}

}  // namespace
}  // namespace octavo
