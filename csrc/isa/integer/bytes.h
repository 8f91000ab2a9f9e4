// SPDX-License-Identifier: Apache-2.0
// Bytes and words of whole numbers, as wide as the including file's compile flags allow.
#pragma once

#if defined(__AVX512F__)
#include "bytes_avx512.h"
#else
#include "bytes_avx2.h"
#endif

namespace octavo {
namespace {}  // namespace
}  // namespace octavo
