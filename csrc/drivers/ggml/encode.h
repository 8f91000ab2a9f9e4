// SPDX-License-Identifier: Apache-2.0
// Floats to the parts of a block, one function for each type: the codes of ggml, byte for byte.
#pragma once

#include "blocks.h"

namespace octavo {

// encode_small.cpp: one scale for a block.
void encode_q4_0(const BlockInput& input, BlockParts& parts);
void encode_q4_1(const BlockInput& input, BlockParts& parts);
void encode_q5_0(const BlockInput& input, BlockParts& parts);
void encode_q5_1(const BlockInput& input, BlockParts& parts);
void encode_q8_0(const BlockInput& input, BlockParts& parts);
void encode_q1_0(const BlockInput& input, BlockParts& parts);
void encode_q2_0(const BlockInput& input, BlockParts& parts);
void encode_ternary(const BlockInput& input, BlockParts& parts);

// encode_super.cpp: scales on two levels.
void encode_q2_k(const BlockInput& input, BlockParts& parts);
void encode_q3_k(const BlockInput& input, BlockParts& parts);
void encode_q4_k(const BlockInput& input, BlockParts& parts);
void encode_q5_k(const BlockInput& input, BlockParts& parts);
void encode_q6_k(const BlockInput& input, BlockParts& parts);

// encode_table.cpp: codes that are places in a table.
void encode_iq4_nl(const BlockInput& input, BlockParts& parts);
void encode_iq4_xs(const BlockInput& input, BlockParts& parts);
void encode_mxfp4(const BlockInput& input, BlockParts& parts);
void encode_nvfp4(const BlockInput& input, BlockParts& parts);

extern const std::int8_t kIq4Values[16], kFloat4Values[16];

}  // namespace octavo
