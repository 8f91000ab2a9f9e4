# SPDX-License-Identifier: Apache-2.0
"""The linear layer with a weight of 16-bit floats: one chain of fma for each output, the bits of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .codes import fma
from .floats import activate


def pack_half(weight: torch.Tensor) -> torch.Tensor:
    """The kernels' layout, drawn in docs/packed_format.md: strips of 16 rows, and in a strip one line for each k.

    weight   [n, k] bfloat16 or float16
    returns  [ceil(n / 16), k, 16] in weight's dtype, padded with zeros
    """
    n, k = weight.shape
    padded = F.pad(weight, (0, 0, 0, -n % 16))
    return padded.reshape(-(-n // 16), 16, k).transpose(1, 2).contiguous()


def pack_half_into(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """`pack_half` into `packed`."""
    packed.copy_(pack_half(weight))


def unpack_half(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The weight [n, k] that `pack_half` was given."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * 16, k)[:n].contiguous()


def linear_half(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias in float32: products are added in ascending order of k, each with one rounding.

    x        [..., k] float32, bfloat16 or float16; packed as from `pack_half`; bias [n] or None
    returns  [..., n] in x's dtype; NaN and Inf are numbers like any other
    source   ours
    """
    k = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), k).float()
    weight = unpack_half(packed, n, k).float()
    y = torch.zeros(len(rows), n)
    for i in range(k):
        y = fma(rows[:, i, None], weight[:, i], y)
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        y = activate(y, activation)
    return y.to(x.dtype).reshape(*x.shape[:-1], n)
