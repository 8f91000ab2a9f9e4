# SPDX-License-Identifier: Apache-2.0
"""Attention in one call: softmax(scale q k^T + mask) v without the matrix of scores ever existing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..base.float_types import FLOAT_DTYPES
from . import shapes
from .checks import check, wants_gradient
from .registration import register_fake

PRECISIONS = ("auto", "float32", "bfloat16", "int8")
_NUMBERS = {name: number for number, name in enumerate(PRECISIONS)}
_attention = torch.ops.octavo.attention.default
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


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
    """softmax(scale * q @ k.T + mask) @ v for each head; the heads of a position lie side by side in the result.

    q          [batch, heads, queries, dimension] float32, bfloat16 or float16; dimension a multiple of 16 up to 128
    k, v       [batch, kv_heads, keys, dimension], of any of these dtypes; heads is a multiple of kv_heads, and
               query head i reads key head i // (heads // kv_heads). Any strides; a copy is made only where the last
               one is not 1. Under autocast all three are cast
    mask       broadcast to [batch, heads, queries, keys]: bool, True where a query may look, or floats that are added
    causal     query i looks at keys up to i + keys - queries (bottom right, for a cache); with a mask, both hold
    scale      1 / sqrt(dimension) if None
    precision  of the products: "float32"; "bfloat16", with sums in float32; "int8", exact sums of 8-bit codes; "auto",
               bfloat16 where the CPU has it (AVX512_BF16), else float32. int8 is four times as far from float32 as
               bfloat16, 1 to 1.5 %, but exists everywhere and has the same bits everywhere. Few queries, as in
               decoding (6 rows of queries for one head of keys), are computed in float32 in any case: they read
               each key once, and making codes of it would take longer than multiplying it
    returns    [batch, queries, heads * dimension], contiguous, in q's dtype. A query that may look at no key gives
               zeros (torch: NaN or zeros); one with NaN gives NaN and touches no other. A hidden key counts for
               nothing, whatever k and v hold there; with int8, hidden values still take part in the scales of
               values, and a key that is not finite gives NaN to those who see it, a head with values that are not
               finite is computed in float32. Where a gradient is needed, torch's function computes all of it: the
               same is hidden and the same rows are zeros, but what hidden keys and values hold must be finite there
    raises     TypeError for another dtype; ValueError for shapes that do not fit, another dimension, and a precision
               that the active instruction set does not have
    source     Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; online softmax: Milakov and Gimelshein 2018
               (arXiv:1805.02867), algorithm 3; docs/numerics.md
    """
    if _is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if getattr(tensor, "dtype", None) not in FLOAT_DTYPES:
            check("attention", name, tensor, FLOAT_DTYPES)
    number = _NUMBERS.get(precision)
    if number is None:
        raise ValueError(
            f"attention: precision is {precision!r}, accepted: {', '.join(map(repr, PRECISIONS))}"
        )
    if mask is not None:
        check("attention", "mask", mask, (*FLOAT_DTYPES, torch.bool))
        if k.dim() == 4 and (mask.dim() == 0 or shapes.known(mask.shape[-1] == 1)):
            mask = mask.expand(*mask.shape[:-1], k.shape[-2])
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.dim() == 4 and q.shape[-1] > 0 else 1.0
    if _is_grad_enabled() and wants_gradient(q, k, v, mask):
        shapes.attention(q, k, v, mask)
        if precision == "bfloat16":  # without rows it only says whether the active instruction set has it
            _attention(*(x[:0].detach() for x in (q, k, v)), None, causal, scale, number)
        return torch_attention(q, k, v, mask, causal, scale)
    return _attention(q, k, v, mask, causal, scale, number)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """The same by torch's function, with gradients."""
    if causal:
        mask = causal_mask(mask, q.shape[-2], k.shape[-2])
    blind = None  # queries that may look at no key
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        # As the kernels have it: the least float32 times log2(e) is -Inf, and hides.
        hidden = ~mask if mask.dtype == torch.bool else (mask.float() * math.log2(math.e)).isneginf()
        blind = hidden.all(-1, keepdim=True)
        if mask.dtype == torch.bool:
            mask = mask | blind
        else:  # a large number need not exist in q's dtype
            mask = mask.float().clamp(min=torch.finfo(q.dtype).min).to(q.dtype).masked_fill(hidden, -math.inf)
            mask = mask.masked_fill(blind, 0)
    shares_keys = True if q.shape[1] != k.shape[1] else False  # while tracing, the comparison is no bool
    y = F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), mask, scale=scale, enable_gqa=shares_keys
    )
    if blind is not None:
        y = y.masked_fill(blind, 0)
    return y.transpose(1, 2).flatten(2)


def causal_mask(mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor:
    """`mask` where query i may look, up to key i + keys - queries, and nothing beyond; torch's own starts top left."""
    past = torch.ones(queries, keys, dtype=torch.bool, device="cpu").tril(keys - queries)
    if mask is None:
        return past
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -math.inf)


@register_fake("octavo::attention")
def _(q, k, v, mask, causal, scale, precision):
    text = "precision must be 0 (auto), 1 (float32), 2 (bfloat16) or 3 (int8)"
    shapes.attention(q, k, v, mask)
    shapes.require(0 <= precision <= 3, f"attention: {text}, is {precision}")
    batch, heads, queries, dimension = q.shape
    return q.new_empty((batch, queries, heads * dimension))
