# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' Linear8bitLt without outlier columns: rows and channels scaled one by one, torch._int_mm inside.

And its NF4 in blocks of 64, which are decoded in each call.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("bitsandbytes",)


def build(linear: nn.Linear) -> Run:
    from bitsandbytes.nn import Linear8bitLt

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every call that it casts
    layer = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").eval()  # quantizes


def nf4(linear: nn.Linear, compute_dtype: torch.dtype) -> Run:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        quant_type="nf4",
        compute_dtype=compute_dtype,
        compress_statistics=False,
    )
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu").eval()
    return lambda x: layer(x.to(compute_dtype)).to(x.dtype)


RIVALS = [Rival("bitsandbytes int8", build, True, (torch.float32, torch.bfloat16))]
LOW_BITS = [
    Rival("bitsandbytes nf4 g64", partial(nf4, compute_dtype=torch.float32), False),
    Rival("bitsandbytes nf4 g64, bf16", partial(nf4, compute_dtype=torch.bfloat16), False),
]
