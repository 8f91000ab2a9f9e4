// SPDX-License-Identifier: Apache-2.0
// Activation functions over a Vector. NaN stays NaN.
#pragma once

#include "exp.h"

namespace octavo {
namespace {

constexpr float kLog2E = 1.44269504f;

struct Relu {
  Vector operator()(Vector x) const { return max(set(0.0f), x); }
};

// x / (1 + exp(-x))
struct Silu {
  Vector operator()(Vector x) const { return x / (set(1.0f) + exp2(min(set(126.0f), x * set(-kLog2E)))); }
};

template <class F>
void activate_with(const Activate& a, const F& f) {
  with_type(a.x_type, [&](auto from) {
    with_type(a.type, [&](auto to) {
      for (std::int64_t i = 0; i < a.count; i += 16) {
        const Vector x = load<decltype(from)::value>(a.x, i, a.count - i);
        store<decltype(to)::value>(a.out, i, f(x), a.count - i);
      }
    });
  });
}

inline void activate(const Activate& a) {
  switch (a.activation) {
    case Activation::silu: return activate_with(a, Silu{});
    default: return activate_with(a, Relu{});
  }
}

}  // namespace
}  // namespace octavo
