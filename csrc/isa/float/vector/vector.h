// SPDX-License-Identifier: Apache-2.0
// The widest Vector that the including file's compile flags allow.
#pragma once

#include "isa/common/float_type.h"

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#else
#include "vector_scalar.h"
#endif

namespace octavo {
namespace {

// Calls f(i, lanes) for the elements i .. i + lanes of a row. All vectors but the last one have 16 lanes, and the compiler
// knows this. Masks cost little by themselves, but a load cannot take its value directly from a masked store before it.
template <class F>
inline void each_vector(std::int64_t count, const F& f) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) f(i, std::int64_t{16});
  if (i < count) f(i, count - i);
}

}  // namespace
}  // namespace octavo
