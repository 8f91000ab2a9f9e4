# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' Linear8bitLt without outlier columns: rows and channels scaled one by one, torch._int_mm inside."""

from __future__ import annotations

import logging

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


RIVALS = [Rival("bitsandbytes int8", build, True, (torch.float32, torch.bfloat16))]
