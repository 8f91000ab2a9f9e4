# SPDX-License-Identifier: Apache-2.0
"""What one writes by hand on torch._int_mm: quantize each row, multiply, scale. Both orders of the stored weight.

oneDNN packs the weight anew in each call with more than one row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("torch",)


def build(linear: nn.Linear, transpose: bool) -> Run:
    weight = linear.weight.detach().float()
    weight_scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / weight_scale).round().to(torch.int8)
    right = codes.t().contiguous() if transpose else codes.t()
    weight_scale = weight_scale.t().contiguous()
    bias = linear.bias.detach().float()

    def run(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / 127
        product = torch._int_mm((x / scale).round().to(torch.int8), right)
        return (product.float() * scale).mul_(weight_scale).add_(bias).to(x.dtype)

    return run


BOTH = (torch.float32, torch.bfloat16)
RIVALS = [
    Rival("int_mm", partial(build, transpose=False), True, BOTH),
    Rival("int_mm [k, n]", partial(build, transpose=True), True),
]
