# SPDX-License-Identifier: Apache-2.0
"""Codes and their scales: choose_qparams, quantize, dequantize, the exact integer product, packing."""

from __future__ import annotations

import torch

from .checks import CODE_TYPES, FLOAT_TYPES, check, check_dtype

# Looked up once: 0.3 us for each attribute path.
_choose_qparams = torch.ops.octavo.choose_qparams.default
_quantize = torch.ops.octavo.quantize.default
_dequantize = torch.ops.octavo.dequantize.default
_int8_mm = torch.ops.octavo.int8_mm.default
_pack_weight = torch.ops.octavo.pack_weight.default
_pack_weight_into = torch.ops.octavo.pack_weight_into.default
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
    check("choose_qparams", "x", x, FLOAT_TYPES)
    return _choose_qparams(x.detach(), qmin, qmax, symmetric)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, dtype: torch.dtype
) -> torch.Tensor:
    """Codes of `x`: clamp(round_half_even(x / scale) + zero_point, qmin, qmax). NaN becomes zero_point.

    x        [rows, columns] float32, bfloat16 or float16; scale float32 [rows]; zero_point int32 [rows]
    returns  [rows, columns], `dtype` int8 or uint8
    raises   TypeError for another dtype; ValueError for shapes that do not fit and a range outside `dtype`
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    check("quantize", "x", x, FLOAT_TYPES)
    check_dtype("quantize", dtype, CODE_TYPES)
    return _quantize(x.detach(), scale.detach(), zero_point, qmin, qmax, dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Real values: scale * (code - zero_point), rounded once to float32 and then to `dtype`.

    codes    [rows, columns] int8 or uint8; scale float32 [rows]; zero_point int32 [rows]
    returns  [rows, columns], `dtype` float32, bfloat16 or float16
    raises   TypeError for another dtype; ValueError for shapes that do not fit
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    check("dequantize", "codes", codes, CODE_TYPES)
    check_dtype("dequantize", dtype, FLOAT_TYPES)
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


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """The shape of a packed weight of n rows and k columns."""
    return (n + 15) // 16, (k + 63) // 64, 16, 64


def pack_weight_into(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`pack_weight` into memory that is there already: fills `packed`, int8 and contiguous; returns column_sum.

    raises   as `pack_weight`; ValueError if packed has another shape than packed_shape(n, k)
    source   ours
    """
    check("pack_weight_into", "codes", codes, {torch.int8})
    return _pack_weight_into(codes, packed)


def unpack_weight(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes [n, k] int8 that `pack_weight` was given.

    raises   TypeError for another dtype; ValueError if `packed` does not hold n x k codes
    source   ours
    """
    check("unpack_weight", "packed", packed, {torch.int8})
    return _unpack_weight(packed, n, k)


# --- fakes: shape and dtype without data ----------------------------------------------------------------------------


@torch.library.register_fake("octavo::choose_qparams")
def _(x, qmin, qmax, symmetric):
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.int32)


@torch.library.register_fake("octavo::quantize")
def _(x, scale, zero_point, qmin, qmax, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("octavo::dequantize")
def _(codes, scale, zero_point, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.register_fake("octavo::int8_mm")
def _(a, b):
    torch._check(
        a.shape[1] == b.shape[0], lambda: f"int8_mm: a has {a.shape[1]} columns, b has {b.shape[0]} rows"
    )
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


@torch.library.register_fake("octavo::pack_weight")
def _(codes):
    n, k = codes.shape
    return codes.new_empty(packed_shape(n, k)), codes.new_empty(n, dtype=torch.int32)


@torch.library.register_fake("octavo::pack_weight_into")
def _(codes, packed):
    return codes.new_empty(codes.shape[0], dtype=torch.int32)


@torch.library.register_fake("octavo::unpack_weight")
def _(packed, n, k):
    return packed.new_empty((n, k))
