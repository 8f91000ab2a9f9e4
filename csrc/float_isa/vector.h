// SPDX-License-Identifier: Apache-2.0
// The widest Vector that the including file's compile flags allow.
#pragma once

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#else
#include "vector_scalar.h"
#endif

namespace octavo {
namespace {

template <FloatType kType>
struct Constant {
  static constexpr FloatType value = kType;
};

// f(Constant<type>): from a type known at run time to one known at compile time.
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
