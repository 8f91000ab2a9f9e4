// SPDX-License-Identifier: Apache-2.0
// Turns a float type that is known at run time into one that is known at compile time.
#pragma once

#include "contract/kernel.h"

namespace octavo {
namespace {  // each file has its own copy, so that no code of another instruction set is linked in

template <FloatType kType>
struct Constant {
  static constexpr FloatType value = kType;
};

// Calls f(Constant<type>).
template <class F>
inline auto with_type(FloatType type, const F& f) {
  switch (type) {
    case FloatType::bf16: return f(Constant<FloatType::bf16>{});
    case FloatType::f16: return f(Constant<FloatType::f16>{});
    default: return f(Constant<FloatType::f32>{});
  }
}

}  // namespace
}  // namespace octavo
