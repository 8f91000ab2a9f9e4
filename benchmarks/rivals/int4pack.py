# SPDX-License-Identifier: Apache-2.0
"""torch's own operator for 4-bit weights in groups with a scale and a minimum, activations in float32 and bfloat16.

It has a kernel for AVX512 and one for AVX2, and multiplies floats.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("torch",)
GROUP = 32


def build(linear: nn.Linear, dtype: torch.dtype) -> Run:
    weight = linear.weight.detach().float()
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-9)
    middle = low + 8 * scale  # the value of code 8
    codes = ((grouped - middle[..., None]) / scale[..., None]).round().add(8).clamp(0, 15).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1), 1)
    scales = torch.stack([scale, middle], -1).transpose(0, 1).contiguous().to(dtype)
    bias = linear.bias.detach().float()

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(dtype), packed, GROUP, scales)
        return y.float().add_(bias)

    return run


LOW_BITS = [
    Rival("torch int4pack g32", partial(build, dtype=torch.float32), False),
    Rival("torch int4pack g32, bf16", partial(build, dtype=torch.bfloat16), False),
]
