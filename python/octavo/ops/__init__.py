# SPDX-License-Identifier: Apache-2.0
"""Typed wrappers of `torch.ops.octavo.*`, their fakes (shapes for torch.compile and torch.export), gradients, batches.

The C++ side holds the schemas and the kernels.
"""

from . import batching
from .activations import ACTIVATIONS, activate, activation_number, silu_mul, torch_activation
from .checks import CODE_TYPES, HALF_TYPES, WIDE_CODE_TYPES
from .codes import (
    choose_qparams,
    dequantize,
    int8_mm,
    list_saturating,
    pack_weight,
    pack_weight_into,
    packed_shape,
    quantize,
    unpack_weight,
)
from .embedding import ID_TYPES, embedding_groups, embedding_half
from .ggml import block_type, ggml_dequantize, ggml_pack, ggml_quantize, ggml_unpack
from .groups import GroupWeight, dequantize_groups, group_weight, linear_groups, pack_planes, unpack_planes
from .half import linear_half, pack_half, pack_half_into, packed_half_shape, unpack_half
from .linear import linear_codes, linear_dynamic, linear_static, linear_weight_only
from .norms import add_norm, add_norm_codes, rms_norm, rope
from .softmax_attention import PRECISIONS, attention

__all__ = [
    "ACTIVATIONS",
    "CODE_TYPES",
    "HALF_TYPES",
    "ID_TYPES",
    "PRECISIONS",
    "WIDE_CODE_TYPES",
    "GroupWeight",
    "activate",
    "activation_number",
    "add_norm",
    "add_norm_codes",
    "attention",
    "block_type",
    "choose_qparams",
    "dequantize",
    "dequantize_groups",
    "embedding_groups",
    "embedding_half",
    "ggml_dequantize",
    "ggml_pack",
    "ggml_quantize",
    "ggml_unpack",
    "group_weight",
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
    "packed_half_shape",
    "packed_shape",
    "quantize",
    "rms_norm",
    "rope",
    "silu_mul",
    "torch_activation",
    "unpack_half",
    "unpack_planes",
    "unpack_weight",
]
