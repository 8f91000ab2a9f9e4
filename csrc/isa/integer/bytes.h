// SPDX-License-Identifier: Apache-2.0
// Whole numbers as bytes, as wide as the including file's compile flags allow.
#pragma once

#include <cstring>

#if defined(__AVX512F__)
#include "bytes_avx512.h"
#else
#include "bytes_avx2.h"
#endif

namespace octavo {
namespace {

// The first `count` of 64 bytes.
inline void store_part(std::uint8_t* to, std::int64_t count, const Words64& bytes) {
  if (count >= 64) return bytes.store_bytes(to);
  std::uint8_t all[64];
  bytes.store_bytes(all);
  std::memcpy(to, all, static_cast<std::size_t>(count));
}

}  // namespace
}  // namespace octavo
