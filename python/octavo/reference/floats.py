# SPDX-License-Identifier: Apache-2.0
"""The float operators, computed in float64 and rounded once: kernels are within a stated bound of these."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """relu, gelu, gelu_tanh or silu of x, in its dtype.

    source   Hendrycks and Gimpel 2016 (arXiv:1606.08415)
    """
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
    }
    return functions[activation](x.double()).to(x.dtype)


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
