# SPDX-License-Identifier: Apache-2.0
"""Attention with products of 8-bit codes, bit for bit what ops.attention(precision="int8") gives: numerics.md, eq. 54.

Few queries, and heads whose values are not all finite, are another matter: the operator computes those in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .codes import SMALLEST_SCALE, fma
from .floats import repeat_heads

BLOCK = 256  # keys that share a running maximum
LOG2_E = 1.4426950408889634
EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 0.24022651, 0.69314718, 1.0)
EXP2_COARSE = (0.05500893, 0.24221096, 0.69328293, 1.0)


def attention_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale * q @ k.T + mask) @ v with products of codes, [batch, queries, heads * dimension] in q's dtype.

    q, k, v  as in ops.attention, v finite
    source   ours
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    factor = (torch.tensor(scale, dtype=torch.float32).double() * LOG2_E).float()
    q_codes, q_scale = row_codes(q.float() * factor)
    k_codes, k_scale = row_codes(repeat_heads(k, q.shape[1]).float())
    v_codes, v_scale = row_codes(repeat_heads(v, q.shape[1]).float().mT)
    scores = (q_codes @ k_codes.mT).float() * q_scale * k_scale.mT
    scores = _masked(scores, mask, causal)

    largest = torch.full_like(scores[..., :1], -math.inf)
    total, sums = torch.zeros_like(largest), torch.zeros_like(q, dtype=torch.float32)
    for first in range(0, scores.shape[-1], BLOCK):
        block = slice(first, first + BLOCK)
        before, largest = largest, torch.maximum(largest, _largest(scores[..., block]))
        factor = torch.where(before > -math.inf, exp2(before - largest, EXP2), 1.0)
        weights = weight_codes(scores[..., block] - largest.clamp(min=torch.finfo(torch.float32).min))
        total = total * factor + weights.sum(-1, keepdim=True)
        block_sums = (weights.double() @ v_codes.mT[..., block, :]).float()
        sums = fma(block_sums, v_scale.mT, sums * factor)
    y = sums * torch.where(total == 0, 0.0, 1 / total)
    return y.transpose(1, 2).flatten(2).to(q.dtype)


def row_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of each row, as float64, and the rows' scales [..., 1], NaN for rows that are not finite."""
    scale = F.pad(x.abs(), (0, 1)).amax(-1, keepdim=True) / 127
    scale = torch.where(scale < SMALLEST_SCALE, 1.0, scale)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return torch.round(x * (1 / scale)).nan_to_num(nan=0.0).double(), scale


def weight_codes(exponents: torch.Tensor) -> torch.Tensor:
    """Codes 0 .. 255 of 2^exponents, at most 1."""
    return torch.round(exp2(exponents, EXP2_COARSE) * 255)


def exp2(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    """2^x in float32: a polynomial in what rounding leaves of x."""
    x = x.clamp(min=-150)
    n = torch.round(x)
    p = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        p = fma(p, x - n, torch.full_like(x, coefficient))
    return (p.double() * torch.exp2(n.double())).float()


def _masked(scores: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        bias = mask.float() * torch.tensor(LOG2_E, dtype=torch.float32)
        scores, hidden = scores + bias, hidden | (bias == -math.inf)
    if causal:
        queries, keys = scores.shape[-2:]
        hidden = hidden | torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return scores.masked_fill(hidden, -math.inf)


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """The largest score of each row; NaN, which makes the row's weights NaN, aside."""
    return scores.masked_fill(scores.isnan(), -math.inf).amax(-1, keepdim=True)
