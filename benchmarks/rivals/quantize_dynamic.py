# SPDX-License-Identifier: Apache-2.0
"""torch.ao.quantization.quantize_dynamic: one scale for the whole input, and 7 bits under the engine x86.

x86 takes FBGEMM or oneDNN, layer by layer; onednn keeps a second copy of the weight. It takes float32 only: for other
inputs the casts are part of the call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from octavo.lab.bench import quantize_dynamic

from . import Rival, Run

REQUIRES = ("torch",)


def build(linear: nn.Linear, engine: str, per_channel: bool) -> Run:
    layer = quantize_dynamic(linear, engine, per_channel)
    if linear.weight.dtype == torch.float32:
        return layer
    return lambda x: layer(x.float()).to(x.dtype)


RIVALS = [
    Rival(
        "quantize_dynamic",
        partial(build, engine="x86", per_channel=False),
        as_accurate=False,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Rival("quantize_dynamic per channel", partial(build, engine="x86", per_channel=True), as_accurate=False),
    Rival("quantize_dynamic onednn", partial(build, engine="onednn", per_channel=False), as_accurate=False),
]
LOW_BITS = RIVALS[:1]
