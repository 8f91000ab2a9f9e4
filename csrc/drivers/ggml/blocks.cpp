// SPDX-License-Identifier: Apache-2.0
// The list of types.
#include "blocks.h"

#include <iterator>

#include "base/check.h"
#include "encode.h"
#include "small_blocks.h"
#include "super_blocks.h"

namespace octavo {
namespace {

constexpr Number kNone = Number::none, kHalf = Number::f16;

// id, name, elements, bytes, group, bits, offset, scale, minimum, two levels, values, unit, and three functions.
constexpr BlockForm kForms[] = {
    {2, "Q4_0", 32, 18, 32, 4, 8, kHalf, kNone, false, nullptr, 1.0f, take_apart_q4<1>, put_together_q4<1>,
     encode_q4_0},
    {3, "Q4_1", 32, 20, 32, 4, 0, kHalf, kHalf, false, nullptr, 1.0f, take_apart_q4<2>, put_together_q4<2>,
     encode_q4_1},
    {6, "Q5_0", 32, 22, 32, 5, 16, kHalf, kNone, false, nullptr, 1.0f, take_apart_q5<1>, put_together_q5<1>,
     encode_q5_0},
    {7, "Q5_1", 32, 24, 32, 5, 0, kHalf, kHalf, false, nullptr, 1.0f, take_apart_q5<2>, put_together_q5<2>,
     encode_q5_1},
    {8, "Q8_0", 32, 34, 32, 8, 128, kHalf, kNone, false, nullptr, 1.0f, take_apart_q8_0, put_together_q8_0,
     encode_q8_0},
    {10, "Q2_K", 256, 84, 16, 2, 0, Number::low4, Number::high4, true, nullptr, 1.0f, take_apart_q2_k,
     put_together_q2_k, encode_q2_k},
    {11, "Q3_K", 256, 110, 16, 3, 4, Number::s8, kNone, true, nullptr, 1.0f, take_apart_q3_k, put_together_q3_k,
     encode_q3_k},
    {12, "Q4_K", 256, 144, 32, 4, 0, Number::u8, Number::u8, true, nullptr, 1.0f, take_apart_q4_k, put_together_q4_k,
     encode_q4_k},
    {13, "Q5_K", 256, 176, 32, 5, 0, Number::u8, Number::u8, true, nullptr, 1.0f, take_apart_q5_k, put_together_q5_k,
     encode_q5_k},
    {14, "Q6_K", 256, 210, 16, 6, 32, Number::s8, kNone, true, nullptr, 1.0f, take_apart_q6_k, put_together_q6_k,
     encode_q6_k},
    {20, "IQ4_NL", 32, 18, 32, 4, 127, kHalf, kNone, false, kIq4Values, 1.0f, take_apart_q4<1>, put_together_q4<1>,
     encode_iq4_nl},
    {23, "IQ4_XS", 256, 136, 32, 4, 127, Number::s8, kNone, true, kIq4Values, 1.0f, take_apart_iq4_xs,
     put_together_iq4_xs, encode_iq4_xs},
    {34, "TQ1_0", 256, 54, 256, 2, 1, kHalf, kNone, false, nullptr, 1.0f, take_apart_tq1_0, put_together_tq1_0,
     encode_ternary},
    {35, "TQ2_0", 256, 66, 256, 2, 1, kHalf, kNone, false, nullptr, 1.0f, take_apart_tq2_0, put_together_tq2_0,
     encode_ternary},
    {39, "MXFP4", 32, 17, 32, 4, 12, Number::e8m0, kNone, false, kFloat4Values, 0.5f, take_apart_mxfp4,
     put_together_mxfp4, encode_mxfp4},
    {40, "NVFP4", 64, 36, 16, 4, 12, Number::e4m3, kNone, false, kFloat4Values, 0.5f, take_apart_nvfp4,
     put_together_nvfp4, encode_nvfp4},
    {41, "Q1_0", 128, 18, 128, 2, 1, kHalf, kNone, false, nullptr, 1.0f, take_apart_q1_0, put_together_q1_0,
     encode_q1_0},
    {42, "Q2_0", 64, 18, 64, 2, 1, kHalf, kNone, false, nullptr, 1.0f, take_apart_q2_0, put_together_q2_0, encode_q2_0},
};

}  // namespace

const BlockForm& block_form(const char* op, std::int64_t id) {
  for (const BlockForm& form : kForms) {
    if (form.id == id) return form;
  }
  require(false, op, ": type ", id, " is none that octavo has blocks for");
  return kForms[0];
}

}  // namespace octavo
