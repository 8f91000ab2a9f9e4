# SPDX-License-Identifier: Apache-2.0
"""What the operators of weights in groups accept, in Python; shapes.py says why and has the rest."""

from __future__ import annotations

from typing import Any

import torch

from ..base.float_types import FLOAT_DTYPES
from .shapes import packed_weight, require

_NUMBERS = (*FLOAT_DTYPES, torch.uint8, torch.int8, torch.float8_e4m3fn)
_NAMES = "float32, bfloat16, float16, uint8, int8 or float8_e4m3fn"


def plane_bits(op: str, bits: int) -> None:
    text = f"{op}: bits must be in 1 .. 7, is {bits}; codes of 8 bits are packed by pack_weight"
    require(1 <= bits and bits <= 7, text)


def planes_shape(n: int, k: int, bits: int) -> tuple[int, int, int, int]:
    """The shape of packed codes of `bits` bits."""
    return (n + 15) // 16, 2 * ((k + 63) // 64), bits, 64


def packed_planes(op: str, name: str, tensor: torch.Tensor, n: int, k: int, bits: int) -> None:
    shape = planes_shape(n, k, bits)
    text = (
        f"{op}: {name} does not hold a weight of {n} x {k} with {bits} bits; need uint8 [{shape[0]}, {shape[1]}, "
        f"{bits}, 64] as pack_planes makes it"
    )
    require(tensor.dtype == torch.uint8 and tensor.dim() == 4, text)
    _has_shape(tensor, shape, text)


def group_weight(op: str, k: int, weight: tuple[Any, ...]) -> None:
    """`weight` is a GroupWeight."""
    codes, scale, super_scale, minimum, table, column_scale, n, bits, group_size, offset = weight
    require(n >= 0, f"{op}: n must not be negative, is {n}")
    require(1 <= bits and bits <= 8, f"{op}: bits must be in 1 .. 8, is {bits}")
    text = f"{op}: group_size must be a multiple of 16, or 0 for one group, is {group_size}"
    require(group_size >= 0 and group_size % 16 == 0, text)
    require(0 <= offset and offset <= 255, f"{op}: offset must be in 0 .. 255, is {offset}")
    if bits == 8:
        packed_weight(op, codes, n, k)
    else:
        packed_planes(op, "codes", codes, n, k, bits)
    groups = (k + group_size - 1) // group_size if group_size else 1
    strips = (n + 15) // 16
    for name, tensor in (("scale", scale), ("minimum", minimum)):
        if tensor is not None:
            require(tensor.dtype in _NUMBERS, f"{op}: {name} must be {_NAMES}")
            text = f"{op}: {name} must be [{strips}, {groups}, 16]"
            require(tensor.dim() == 3, text)
            _has_shape(tensor, (strips, groups, 16), text)
    if super_scale is not None:
        _super_scale(op, super_scale, strips, groups)
    _numbers(op, scale, super_scale, minimum)
    if table is not None:
        _table(op, table, bits)
    if column_scale is not None:
        text = f"{op}: column_scale must be float32 with {n} values"
        require(column_scale.dtype == torch.float32 and column_scale.dim() == 1, text)
        require(column_scale.shape[0] == n, text)


def group_input(op: str, bits: int, group_size: int) -> None:
    require(bits in (8, 16), f"{op}: input_bits must be 8 or 16, is {bits}")
    text = f"{op}: input_group must be a multiple of 32, or 0 for one scale for each row, is {group_size}"
    require(group_size >= 0 and group_size % 32 == 0, text)
    text = f"{op}: inputs of 16 bits have one scale for each row; input_group must be 0, is {group_size}"
    require(bits == 8 or group_size == 0, text)


def _table(op: str, table: torch.Tensor, bits: int) -> None:
    text = f"{op}: table must be uint8 with 16 values, for codes of 4 bits"
    require(bits == 4 and table.dtype == torch.uint8 and table.dim() == 1, text)
    require(table.shape[0] == 16, text)


def _super_scale(op: str, super_scale: torch.Tensor, strips: int, groups: int) -> None:
    require(super_scale.dtype in _NUMBERS, f"{op}: super_scale must be {_NAMES}")
    text = f"{op}: super_scale must be floats [{strips}, a divisor of {groups}, 1 or 2, 16]"
    require(super_scale.dtype in FLOAT_DTYPES and super_scale.dim() == 4, text)
    supers = super_scale.shape[1]
    require(supers >= 1, text)
    require(groups % supers == 0, text)
    require(super_scale.shape[2] in (1, 2), text)
    _has_shape(super_scale, (strips, supers, super_scale.shape[2], 16), text)


def _numbers(
    op: str, scale: torch.Tensor | None, super_scale: torch.Tensor | None, minimum: torch.Tensor | None
) -> None:
    if super_scale is not None:
        shares_bytes = minimum is None and scale is not None and scale.dtype == torch.uint8
        rows = super_scale.shape[2]
        text = f"{op}: super_scale has two rows if there are minima, and one row otherwise; it has {rows}"
        require(rows == (1 if minimum is None else 2) or (rows == 2 and shares_bytes), text)
    is_signed = scale is not None and scale.dtype == torch.int8
    require(super_scale is not None or not is_signed, f"{op}: a scale of int8 needs super_scale")
    accepted = (*FLOAT_DTYPES, torch.uint8)
    text = f"{op}: minimum must be float32, bfloat16, float16 or uint8"
    require(minimum is None or minimum.dtype in accepted, text)
    require(minimum is None or scale is not None, f"{op}: minimum needs scale")
    text = f"{op}: with super_scale, minimum must be uint8"
    require(super_scale is None or minimum is None or minimum.dtype == torch.uint8, text)


def _has_shape(tensor: torch.Tensor, shape: tuple[int, ...], text: str) -> None:
    for size, expected in zip(tensor.shape, shape, strict=True):
        require(size == expected, text)
