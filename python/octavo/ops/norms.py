# SPDX-License-Identifier: Apache-2.0
"""Norms, with the residual addition before them and the codes that the next layer reads, and rotary embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..base.float_types import FLOAT_DTYPES
from . import shapes
from .checks import check, wants_gradient
from .registration import register_fake

_rms_norm = torch.ops.octavo.rms_norm.default
_add_norm = torch.ops.octavo.add_norm.default
_add_norm_codes = torch.ops.octavo.add_norm_codes.default
_rope = torch.ops.octavo.rope.default
_is_grad_enabled = torch.is_grad_enabled


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded once.

    x        [..., k] float32, bfloat16 or float16; weight [k], of any of these
    returns  a new tensor like x. Where a gradient is needed, torch's own functions compute it
    raises   TypeError for another dtype; ValueError for shapes that do not fit
    source   Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4; docs/numerics.md, eq. 51
    """
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("rms_norm", "x", x, FLOAT_DTYPES)
    if _is_grad_enabled() and wants_gradient(x, weight):
        shapes.norm("rms_norm", x, weight)
        return _torch_norm(x, weight, None, eps, True)
    return _rms_norm(x, weight, eps)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum, in one pass over memory.

    x, residual   [..., k] float32, bfloat16 or float16, of one shape and dtype; weight [k], bias [k] or None
    rms           False: LayerNorm; True: RMSNorm
    keep_sum      False: the sum is not written, and an empty tensor stands for it
    returns       y and sum like x: sum = x + residual, rounded to their dtype, and y the norm of that. A row with NaN
                  gives a row of NaN and touches no other. Where a gradient is needed, torch's own functions compute it
    raises        TypeError for another dtype; ValueError for shapes that do not fit
    source        Ba et al. 2016 (arXiv:1607.06450), eq. 4; rms: as rms_norm; docs/numerics.md, eq. 51
    """
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("add_norm", "x", x, FLOAT_DTYPES)
    if _is_grad_enabled() and wants_gradient(x, residual, weight, bias):
        shapes.norm("add_norm", x, weight, bias, residual)
        total = x + residual
        return _torch_norm(total, weight, bias, eps, rms), total if keep_sum else x.new_empty(0)
    return _add_norm(x, residual, weight, bias, eps, rms, keep_sum)


def add_norm_codes(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_norm`, and the codes that linear_dynamic, symmetric, would make of y: for `linear_codes`.

    returns  y, sum as add_norm; codes uint8 [..., k], rows further than k apart; scale float32 [rows], NaN for a row
             with NaN or Inf. No gradient passes: detach, or use add_norm and linear_dynamic
    raises   as add_norm; ValueError if a gradient is needed
    source   ours
    """
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("add_norm_codes", "x", x, FLOAT_DTYPES)
    if _is_grad_enabled() and wants_gradient(x, residual, weight, bias):
        raise ValueError(
            "add_norm_codes: codes have no gradient, and an argument needs one; call it under torch.no_grad(), or use "
            "add_norm and linear_dynamic"
        )
    return _add_norm_codes(x, residual, weight, bias, eps, rms, keep_sum)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + rotate_half(x) * sin for q and k; rotate_half(x) = [-x2, x1] for the halves x1, x2 of the last axis.

    q, k      [B, H, L, D] float32, bfloat16 or float16, any strides; they may differ in H
    cos, sin  [B or 1, L, R], R <= D and even, as transformers' Llama makes them; the last D - R elements stay
    returns   two new contiguous tensors. Where a gradient is needed, torch's own functions compute it
    raises    TypeError for another dtype; ValueError for shapes that do not fit
    source    Su et al. 2021 (arXiv:2104.09864), eq. 34; docs/numerics.md, eq. 53
    """
    if getattr(q, "dtype", None) not in FLOAT_DTYPES or getattr(k, "dtype", None) not in FLOAT_DTYPES:
        check("rope", "q", q, FLOAT_DTYPES)
        check("rope", "k", k, FLOAT_DTYPES)
    if _is_grad_enabled() and wants_gradient(q, k, cos, sin):
        shapes.rope(q, k, cos, sin)
        return _torch_rotated(q, cos, sin), _torch_rotated(k, cos, sin)
    return _rope(q, k, cos, sin)


def _torch_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool
) -> torch.Tensor:
    bias = None if bias is None else bias.float()
    if rms:
        y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias, eps)
    return y.to(x.dtype)


def _torch_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, rest = x.float().split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    half_turned = torch.cat([-high, low], dim=-1)
    turned = turned * cos.float()[:, None] + half_turned * sin.float()[:, None]
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


@register_fake("octavo::rms_norm")
def _(x, weight, eps):
    shapes.norm("rms_norm", x, weight)
    return x.new_empty(x.shape)


@register_fake("octavo::add_norm")
def _(x, residual, weight, bias, eps, rms=False, keep_sum=True):
    shapes.norm("add_norm", x, weight, bias, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape if keep_sum else 0)


@register_fake("octavo::add_norm_codes")
def _(x, residual, weight, bias, eps, rms=False, keep_sum=True):
    shapes.norm("add_norm_codes", x, weight, bias, residual)
    strides = [1, (x.shape[-1] + 63) // 64 * 64 + 64]  # of the last axes; the others are contiguous
    for size in reversed(x.shape[1:-1]):
        strides.append(strides[-1] * torch.sym_max(size, 1))
    codes = x.new_empty_strided(x.shape, strides[: x.dim()][::-1], dtype=torch.uint8)
    total = x.new_empty(x.shape if keep_sum else 0)
    return x.new_empty(x.shape), total, codes, x.new_empty(shapes.rows_of(x), dtype=torch.float32)


@register_fake("octavo::rope")
def _(q, k, cos, sin):
    shapes.rope(q, k, cos, sin)
    return q.new_empty(q.shape), k.new_empty(k.shape)
