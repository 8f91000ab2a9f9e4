# SPDX-License-Identifier: Apache-2.0
"""nn.Linear in float32 and bfloat16. Where x has the other type, the casts of input and output are part of the call."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("torch",)
BOTH = (torch.float32, torch.bfloat16)


def fp32(linear: nn.Linear) -> Run:
    layer = deepcopy(linear).float()
    if linear.weight.dtype == torch.float32:
        return layer
    return lambda x: layer(x.float()).to(x.dtype)


def bf16(linear: nn.Linear) -> Run:
    layer = deepcopy(linear).bfloat16()
    if linear.weight.dtype == torch.bfloat16:
        return layer
    return lambda x: layer(x.bfloat16()).to(x.dtype)


RIVALS = [
    Rival("torch fp32", fp32, as_accurate=True, dtypes=BOTH),
    Rival("torch bf16", bf16, as_accurate=True, dtypes=BOTH),
]
LOW_BITS = RIVALS
