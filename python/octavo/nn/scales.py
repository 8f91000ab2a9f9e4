# SPDX-License-Identifier: Apache-2.0
"""Scales stay float32, whatever .half() or .to(dtype) makes of the layer they belong to: a scale keeps all its bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# Codes of static inputs, symmetric ones too: those only choose their scale for -127 .. 127.
INPUT_QMIN, INPUT_QMAX = -128, 127
SCALES = (  # of prepared layers
    "weight_scale",
    "input_scale",
    "input_offset",
    "smoothing",
)


def is_scale_of(layer: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether `tensor` is one of the layer's own scales, or the gradient of one."""
    scales = [layer._parameters.get(name, layer._buffers.get(name)) for name in SCALES]
    return any(tensor is scale or tensor is scale.grad for scale in scales if scale is not None)


def keep_scales(
    layer: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` for nn.Module._apply, which may move the layer's scales but not change their dtype."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        if result.dtype != tensor.dtype and is_scale_of(layer, tensor):
            return tensor.to(result.device)
        return result

    return apply
