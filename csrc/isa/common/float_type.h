// SPDX-License-Identifier: Apache-2.0
// From a float type known at run time to one known at compile time.
#pragma once

#include "contract/kernel.h"

namespace octavo {
namespace {  // each file its own copy: nothing to be linked to from elsewhere

template <FloatType kType>
struct Constant {
  static constexpr FloatType value = kType;
};

// f(Constant<type>)
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
