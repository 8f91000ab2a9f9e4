# SPDX-License-Identifier: Apache-2.0
"""Layers that do something to their input before it is quantized do it in float32, whatever comes in.

So a half-precision input gives the float32 result rounded once, as in the layers that hand it to one operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..base.float_types import FLOAT_DTYPES


def fits(input: torch.Tensor, in_features: int) -> bool:
    """Whether a layer of `in_features` can take `input`; if not, QuantLinear.forward says why."""
    return input.dtype in FLOAT_DTYPES and input.shape[-1:] == (in_features,)


def in_float32(compute: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor) -> torch.Tensor:
    """compute(input as float32), rounded to input's dtype. Under autocast that is autocast's dtype."""
    if torch.is_autocast_enabled("cpu"):
        input = input.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return in_float32(compute, input)
    return compute(input.float()).to(input.dtype)
