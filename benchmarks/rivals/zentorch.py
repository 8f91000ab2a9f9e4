# SPDX-License-Identifier: Apache-2.0
"""AMD's zentorch: int8 activations with int8 weights, and bfloat16 activations with int4 weights in groups of 32.

On CPUs without AVX512 both return garbage and raise nothing, so there it is left out.
"""

from __future__ import annotations

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("zentorch",)


def operators() -> object:
    import zentorch
    import zentorch._C

    if not zentorch._C.is_avx512_supported():
        raise RuntimeError("zentorch computes garbage on CPUs without AVX512")
    return torch.ops.zentorch


def int8(linear: nn.Linear) -> Run:
    ops = operators()
    weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return lambda x: ops.zentorch_dynamic_qlinear(x, codes, scale, bias)


def int4(linear: nn.Linear) -> Run:
    ops = operators()
    grouped = linear.weight.detach().float().unflatten(1, (-1, 32))
    scale = grouped.abs().amax(-1) / 7
    codes = (grouped / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    packed = ops.zentorch_woq_repack_weight(codes).t()
    scales, bias = scale.t().contiguous().bfloat16(), linear.bias.detach().bfloat16()
    return lambda x: ops.zentorch_woq_linear(x.bfloat16(), packed, scales, None, bias).float()


LOW_BITS = [Rival("zentorch int8", int8, True), Rival("zentorch int4 g32, bf16", int4, False)]
