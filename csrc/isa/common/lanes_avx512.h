// SPDX-License-Identifier: Apache-2.0
// Loads and stores up to 16 floats, which have any float type in memory and are float32 in one zmm register.
#pragma once

#include <immintrin.h>

#include "contract/kernel.h"

namespace octavo {
namespace {  // each file has its own copy, so that no code of another instruction set is linked in

// A mask of the first `count` of 16 lanes. A count above 16 means all lanes.
inline __mmask16 first(std::int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1u);
}

// Values from x[i] on as float32. Lanes that `lanes` leaves out are 0 and not read.
template <FloatType kType>
inline __m512 load_lanes(const void* x, std::int64_t i, __mmask16 lanes) {
  if constexpr (kType == FloatType::f32) {
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + i);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const std::uint16_t*>(x) + i);
    if constexpr (kType == FloatType::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// vcvtneps2bf16 would not do: it turns subnormal numbers into 0, and the scalar kernel does not.
inline __m256i bf16_from_float(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

// Rounds the lanes that `lanes` names to kType and stores them.
template <FloatType kType>
inline void store_lanes(void* out, std::int64_t i, __mmask16 lanes, __m512 value) {
  if constexpr (kType == FloatType::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(out) + i, lanes, value);
  } else {
    const __m256i half = kType == FloatType::bf16
                             ? bf16_from_float(value)
                             : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, lanes, half);
  }
}

}  // namespace
}  // namespace octavo
