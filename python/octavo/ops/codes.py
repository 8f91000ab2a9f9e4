# SPDX-License-Identifier: Apache-2.0
"""Codes and their scales: choose_qparams, quantize, dequantize, the exact integer product, packing."""

from __future__ import annotations

import torch

from .. import reference
from ..base.float_types import FLOAT_DTYPES
from . import shapes
from .checks import CODE_TYPES, WIDE_CODE_TYPES, check, check_dtype
from .registration import register_fake
from .shapes import packed_shape

# Looked up once: 0.3 us for each attribute path.
_choose_qparams = torch.ops.octavo.choose_qparams.default
_quantize = torch.ops.octavo.quantize.default
_dequantize = torch.ops.octavo.dequantize.default
_int8_mm = torch.ops.octavo.int8_mm.default
_pack_weight = torch.ops.octavo.pack_weight.default
_pack_weight_into = torch.ops.octavo.pack_weight_into.default
_list_saturating = torch.ops.octavo.list_saturating.default
_unpack_weight = torch.ops.octavo.unpack_weight.default


def choose_qparams(
    x: torch.Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every row of `x`, so that the row's range fits the codes [qmin, qmax].

    x        [rows, columns] float32, bfloat16 or float16
    returns  scale float32 [rows] > 0, real units per step; zero_point int32 [rows]
    raises   TypeError for another dtype; ValueError for NaN or Inf (names the row) and for a bad range
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    check("choose_qparams", "x", x, FLOAT_DTYPES)
    return _choose_qparams(x.detach(), qmin, qmax, symmetric)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, dtype: torch.dtype
) -> torch.Tensor:
    """Codes of `x`: clamp(round_half_even(x / scale) + zero_point, qmin, qmax). NaN becomes zero_point.

    x        [rows, columns] float32, bfloat16 or float16; scale float32 [rows]; zero_point int32 [rows]
    returns  [rows, columns], `dtype` int8 or uint8; int16 and uint16 are computed by torch, as the reference does it
    raises   TypeError for another dtype; ValueError for shapes that do not fit and a range outside `dtype`
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    check("quantize", "x", x, FLOAT_DTYPES)
    if dtype in WIDE_CODE_TYPES:
        shapes.quantize(x, scale, zero_point, qmin, qmax, dtype)
        return reference.quantize(x.detach(), scale.detach(), zero_point, qmin, qmax, dtype)
    check_dtype("quantize", dtype, CODE_TYPES | WIDE_CODE_TYPES)
    return _quantize(x.detach(), scale.detach(), zero_point, qmin, qmax, dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Real values: scale * (code - zero_point), rounded once to float32 and then to `dtype`.

    codes    [rows, columns] int8 or uint8, or int16 or uint16, which torch computes as the reference does;
             scale float32 [rows]; zero_point int32 [rows]
    returns  [rows, columns], `dtype` float32, bfloat16 or float16
    raises   TypeError for another dtype; ValueError for shapes that do not fit
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    check("dequantize", "codes", codes, CODE_TYPES | WIDE_CODE_TYPES)
    check_dtype("dequantize", dtype, FLOAT_DTYPES)
    if codes.dtype in WIDE_CODE_TYPES:
        shapes.dequantize(codes, scale, zero_point, dtype)
        return reference.dequantize(codes, scale.detach(), zero_point, dtype)
    return _dequantize(codes, scale.detach(), zero_point, dtype)


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, exact: no saturation, no 7-bit trick.

    a        [m, k] int8 or uint8; b [k, n] int8; any strides; k at most 65,793
    returns  [m, n] int32
    raises   TypeError for another dtype; ValueError for shapes that do not fit and a longer k
    source   ours
    """
    check("int8_mm", "a", a, CODE_TYPES)
    check("int8_mm", "b", b, {torch.int8})
    return _int8_mm(a, b)


def pack_weight(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout that the linear kernels read; docs/packed_format.md draws it.

    codes    [n, k] int8
    returns  packed int8 [ceil(n / 16), ceil(k / 64), 16, 64], zero-padded; column_sum int32 [n], the sum over k
    raises   TypeError for another dtype; ValueError for another number of dimensions
    source   ours
    """
    check("pack_weight", "codes", codes, {torch.int8})
    return _pack_weight(codes)


def pack_weight_into(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`pack_weight` into memory that is there already: fills `packed`, int8 and contiguous; returns column_sum.

    raises   as `pack_weight`; ValueError if packed has another shape than packed_shape(n, k)
    source   ours
    """
    check("pack_weight_into", "codes", codes, {torch.int8})
    check("pack_weight_into", "packed", packed, {torch.int8})
    if packed.is_neg():  # torch would fill a copy
        raise ValueError("pack_weight_into: packed is a view that torch negates; use packed.resolve_neg()")
    return _pack_weight_into(codes, packed)


def list_saturating(packed: torch.Tensor, column_sum: torch.Tensor) -> torch.Tensor:
    """`column_sum`, and behind it the list of the words in which AVX2's product of bytes can saturate: with it the
    linear operators multiply bytes there, which is faster than int16 and as exact. docs/packed_format.md has the list.

    packed, column_sum   from `pack_weight`
    returns  int32 [n + ceil(n / 16) + 1 + half of the listed words, rounded up]; or int32 [n], a copy, where the list
             is of no use: another instruction set is in use, or too many words would be listed
    raises   TypeError for another dtype; ValueError for shapes that do not fit together
    source   ours
    """
    check("list_saturating", "packed", packed, {torch.int8})
    check("list_saturating", "column_sum", column_sum, {torch.int32})
    return _list_saturating(packed, column_sum)


def unpack_weight(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes [n, k] int8 that `pack_weight` was given.

    raises   TypeError for another dtype; ValueError if `packed` does not hold n x k codes
    source   ours
    """
    check("unpack_weight", "packed", packed, {torch.int8})
    return _unpack_weight(packed, n, k)


# --- fakes ----------------------------------------------------------------------------------------------------------


@register_fake("octavo::choose_qparams")
def _(x, qmin, qmax, symmetric):
    rows, _ = shapes.matrix("choose_qparams", "x", x)
    shapes.float_type("choose_qparams", "x", x)
    shapes.code_range("choose_qparams", qmin, qmax, -65536, 65535)
    text = (
        f"choose_qparams: symmetric needs qmin + qmax even, got {qmin} and {qmax}; use [-127, 127] or [1, 255], or "
        "symmetric=False"
    )
    shapes.require(not symmetric or (qmin + qmax) % 2 == 0, text)
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)


@register_fake("octavo::quantize")
def _(x, scale, zero_point, qmin, qmax, dtype):
    shapes.codes("quantize", "dtype", dtype)
    shapes.quantize(x, scale, zero_point, qmin, qmax, dtype)
    return x.new_empty(x.shape, dtype=dtype)


@register_fake("octavo::dequantize")
def _(codes, scale, zero_point, dtype):
    shapes.matrix("dequantize", "codes", codes)
    shapes.codes("dequantize", "codes", codes.dtype)
    shapes.dequantize(codes, scale, zero_point, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


@register_fake("octavo::int8_mm")
def _(a, b):
    (m, k), (b_rows, n) = shapes.matrix("int8_mm", "a", a), shapes.matrix("int8_mm", "b", b)
    shapes.codes("int8_mm", "a", a.dtype)
    shapes.require(b.dtype == torch.int8, "int8_mm: b must be int8")
    shapes.require(k == b_rows, f"int8_mm: a has {k} columns, b has {b_rows} rows; they must be equal")
    text = f"int8_mm: k is {k}, but int32 sums are exact only up to k = 65793; split k and add the parts in int64"
    shapes.require(k <= 65793, text)
    return a.new_empty((m, n), dtype=torch.int32)


@register_fake("octavo::pack_weight")
def _(codes):
    n, k = shapes.matrix("pack_weight", "codes", codes)
    shapes.require(codes.dtype == torch.int8, "pack_weight: codes must be int8")
    return codes.new_empty(packed_shape(n, k)), codes.new_empty(n, dtype=torch.int32)


@register_fake("octavo::pack_weight_into")
def _(codes, packed):
    n, k = shapes.matrix("pack_weight_into", "codes", codes)
    shapes.require(codes.dtype == torch.int8, "pack_weight_into: codes must be int8")
    shapes.packed_weight("pack_weight_into", packed, n, k)
    shapes.require(packed.is_contiguous(), "pack_weight_into: packed must be contiguous")
    return codes.new_empty(n, dtype=torch.int32)


@register_fake("octavo::list_saturating")
def _(packed, column_sum):
    text = "list_saturating: column_sum must be int32 [n]"
    shapes.require(column_sum.dtype == torch.int32 and column_sum.dim() == 1, text)
    text = "list_saturating: packed must be int8 [strips, tiles, 16, 64] as pack_weight makes it"
    shapes.require(packed.dim() == 4, text)
    shapes.packed_weight("list_saturating", packed, column_sum.shape[0], 64 * packed.shape[1])
    return column_sum.new_empty(
        torch.library.get_ctx().new_dynamic_size()
    )  # the values tell how many are listed


@register_fake("octavo::unpack_weight")
def _(packed, n, k):
    text = f"unpack_weight: n and k must not be negative, got {n} and {k}"
    shapes.require(n >= 0, text)
    shapes.require(k >= 0, text)
    shapes.packed_weight("unpack_weight", packed, n, k)
    return packed.new_empty((n, k))
