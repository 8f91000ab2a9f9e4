# SPDX-License-Identifier: Apache-2.0
"""Rows of a packed weight as floats: what an embedding gives for its ids, with the weight that a product reads, too.

The weight is frozen and ids have no derivative, so nothing here has a gradient.
"""

from __future__ import annotations

import torch

from ..base.float_types import FLOAT_DTYPES
from . import group_shapes, shapes
from .checks import HALF_TYPES, check, check_dtype
from .groups import GroupWeight
from .registration import register_fake

ID_TYPES = frozenset({torch.int64, torch.int32})
_embedding_groups = torch.ops.octavo.embedding_groups.default
_embedding_half = torch.ops.octavo.embedding_half.default


def embedding_groups(
    ids: torch.Tensor, weight: GroupWeight, k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of a weight [n, k] in groups, bit for bit those of `dequantize_groups`.

    ids      [...] int64 or int32, any strides: numbers of rows, 0 .. n - 1
    dtype    float32, bfloat16 or float16
    returns  [..., k] in `dtype`
    raises   IndexError for a number that is no row, as torch's embedding does; TypeError for another dtype; ValueError
             for a weight that does not fit
    source   ours; docs/numerics.md, eq. 61
    """
    check("embedding_groups", "ids", ids, ID_TYPES)
    check_dtype("embedding_groups", dtype, FLOAT_DTYPES)
    return _embedding_groups(ids, *weight, k, dtype)


def embedding_half(
    ids: torch.Tensor, packed: torch.Tensor, n: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of a weight [n, k] of 16-bit floats, as `pack_half` has packed it.

    ids, dtype and what is raised   as in `embedding_groups`
    returns  [..., k] in `dtype`: the values themselves, rounded only from one 16-bit type to the other
    source   ours
    """
    check("embedding_half", "ids", ids, ID_TYPES)
    check("embedding_half", "packed", packed, HALF_TYPES)
    check_dtype("embedding_half", dtype, FLOAT_DTYPES)
    return _embedding_half(ids, packed, n, dtype)


# --- fakes: the numbers in ids are not looked at ----------------------------------------------------------------------


def _check_types(op: str, ids: torch.Tensor, dtype: torch.dtype) -> None:
    shapes.require(ids.dtype in ID_TYPES, f"{op}: ids must be int64 or int32")
    shapes.require(dtype in FLOAT_DTYPES, f"{op}: dtype must be float32, bfloat16 or float16")


@register_fake("octavo::embedding_groups")
def _(ids, *arguments):
    *tensors_and_numbers, k, dtype = arguments
    _check_types("embedding_groups", ids, dtype)
    shapes.require(k >= 0, f"embedding_groups: k must not be negative, is {k}")
    group_shapes.group_weight("embedding_groups", k, GroupWeight(*tensors_and_numbers))
    return ids.new_empty((*ids.shape, k), dtype=dtype)


@register_fake("octavo::embedding_half")
def _(ids, packed, n, dtype):
    _check_types("embedding_half", ids, dtype)
    shapes.require(n >= 0, f"embedding_half: n must not be negative, got {n}")
    k = packed.shape[1] if packed.dim() == 3 else 0
    shapes.packed_half("embedding_half", packed, n, k)
    return ids.new_empty((*ids.shape, k), dtype=dtype)
