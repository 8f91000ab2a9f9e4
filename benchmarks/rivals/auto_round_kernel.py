# SPDX-License-Identifier: Apache-2.0
"""Intel's auto-round-lib: symmetric weights of 2, 3, 4 and 8 bits in groups of 32, and of 8 bits in rows.

Asked for int8 products it has the accuracy of floats. Its woqgemm_s8 has not: on inputs and weights of ones it
saturates, and the result is 99 % off.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("auto_round_kernel",)


def build(linear: nn.Linear, bits: int, group_size: int | None) -> Run:
    import auto_round_kernel

    n, k = linear.out_features, linear.in_features
    group = group_size or k
    top = 2 ** (bits - 1) - 1
    grouped = linear.weight.detach().float().unflatten(1, (-1, group))
    scale = grouped.abs().amax(-1) / top
    codes = (grouped / scale[..., None]).round().clamp(-top - 1, top).flatten(1).to(torch.int8)
    zeros = torch.zeros(k // group, n, dtype=torch.int8)
    kind = (group, "int8", f"int{bits}", "fp32", False)
    packed = auto_round_kernel.repack_quantized_weight(
        codes.t().contiguous(), scale.t().contiguous(), zeros, *kind
    )
    bias = linear.bias.detach().float()
    return lambda x: auto_round_kernel.woqgemm(x, packed, bias, n, k, *kind)


LOW_BITS = [
    Rival("auto-round-lib int8", partial(build, bits=8, group_size=None), False),
    *(
        Rival(f"auto-round-lib int{bits} g32", partial(build, bits=bits, group_size=32), False)
        for bits in (8, 4, 3, 2)
    ),
]
