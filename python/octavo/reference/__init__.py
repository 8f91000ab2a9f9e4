# SPDX-License-Identifier: Apache-2.0
"""Every operator in plain torch, written for reading: the oracle of the tests and the text of the notebooks.

Names, arguments and results are those of `octavo.ops`. What deals with integers is the same bit for bit (codes.py and
integer_attention.py), and so are products of 16-bit floats (half.py): integers are computed in int64, floats in
float32 with one rounding for each operation, as the kernels do. Float operators (floats.py) are computed in float64,
and the kernels stay within a bound of that. A *row* is whatever shares one scale: the whole tensor, a channel, a group
or a token. `docs/numerics.md` has each formula once.
"""

from .codes import (
    MAX_16,
    MAX_EXACT_K,
    SMALLEST_SCALE,
    add_norm_codes,
    choose_qparams,
    dequantize,
    int8_mm,
    linear_codes,
    linear_dynamic,
    linear_static,
    linear_weight_only,
    list_saturating,
    pack_weight,
    pack_weight_into,
    quantize,
    unpack_weight,
)
from .embedding import embedding_groups, embedding_half
from .floats import activate, add_norm, attention, rms_norm, rope, silu_mul
from .ggml import ggml_dequantize, ggml_pack, ggml_quantize, ggml_unpack
from .groups import dequantize_groups, linear_groups, pack_planes, segment_length, unpack_planes
from .half import linear_half, pack_half, pack_half_into, unpack_half
from .integer_attention import attention_int8

__all__ = [
    "MAX_16",
    "MAX_EXACT_K",
    "SMALLEST_SCALE",
    "activate",
    "add_norm",
    "add_norm_codes",
    "attention",
    "attention_int8",
    "choose_qparams",
    "dequantize",
    "dequantize_groups",
    "embedding_groups",
    "embedding_half",
    "ggml_dequantize",
    "ggml_pack",
    "ggml_quantize",
    "ggml_unpack",
    "int8_mm",
    "linear_codes",
    "linear_dynamic",
    "linear_groups",
    "linear_half",
    "linear_static",
    "linear_weight_only",
    "list_saturating",
    "pack_half",
    "pack_half_into",
    "pack_planes",
    "pack_weight",
    "pack_weight_into",
    "quantize",
    "rms_norm",
    "rope",
    "segment_length",
    "silu_mul",
    "unpack_half",
    "unpack_planes",
    "unpack_weight",
]
