# SPDX-License-Identifier: Apache-2.0
"""The float operators, computed in float64 and rounded once: kernels are within a stated bound of these."""

from __future__ import annotations

import math

import torch


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """relu, gelu, gelu_tanh or silu of x, in its dtype; -Inf gives 0, the limit.

    source   Hendrycks and Gimpel 2016 (arXiv:1606.08415)
    """
    return _activate(x.double(), activation).to(x.dtype)


def _activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    match activation:
        case "relu":
            factor = (x > 0).double()
        case "gelu":
            factor = torch.special.erfc(-x / math.sqrt(2)) / 2
        case "gelu_tanh":
            factor = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        case "silu":
            factor = torch.sigmoid(x)
    return torch.where(x == -torch.inf, 0.0, x * factor)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in their dtype."""
    return (_activate(gate.double(), "silu") * up.double()).to(gate.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    source   Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4
    """
    return _norm(x.double(), weight, None, eps, True).to(x.dtype)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum = x + residual in their dtype or, if it is not kept, nothing; before it y, the LayerNorm or RMSNorm of sum.

    source   Ba et al. 2016 (arXiv:1607.06450), eq. 4
    """
    total = (x.float() + residual.float()).to(x.dtype)
    y = _norm(total.double(), weight, bias, eps, rms).to(x.dtype)
    return y, total if keep_sum else total.new_empty(0)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool
) -> torch.Tensor:
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first R elements of each row of q and k, turned in pairs (j, j + R / 2); cos, sin [B or 1, L, R].

    source   Su et al. 2021 (arXiv:2104.09864), eq. 34, with pairs as in Llama
    """
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, rest = x.double().split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    precision: str = "auto",
) -> torch.Tensor:
    """softmax(scale * q @ k.T + mask) @ v for each head, [batch, queries, heads * dimension] in q's dtype.

    Every `precision` is an approximation of this one. Weights of 0 are left out, whatever v holds there.
    source   Vaswani et al. 2017 (arXiv:1706.03762), eq. 1
    """
    weights = attention_weights(q, k, mask, causal=causal, scale=scale)
    values = repeat_heads(v, q.shape[1]).double()
    if not values.isfinite().all():
        products = (weights[..., None] * values[..., None, :, :]).masked_fill((weights == 0)[..., None], 0)
        y = products.sum(-2)
    else:
        y = weights @ values
    return y.transpose(1, 2).flatten(2).to(q.dtype)


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, *, causal: bool, scale: float | None
) -> torch.Tensor:
    """softmax(scale * q @ k.T + mask) in float64, [batch, heads, queries, keys]; zeros for a query that sees no key."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * (q.double() @ repeat_heads(k, q.shape[1]).double().mT)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if mask is not None:
        hidden |= ~mask if mask.dtype == torch.bool else mask == -math.inf
        scores = scores if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        queries, keys = scores.shape[-2:]
        hidden |= torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0)


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Key or value heads, each as often as query heads share it."""
    return x.repeat_interleave(heads // x.shape[1], 1)
