# SPDX-License-Identifier: Apache-2.0
"""What .half() and .to(dtype) must not do to a prepared layer: its scales stay float32 and keep all their bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# The codes of inputs with a fixed scale. Symmetric ones have them, too: their scale is chosen for -127 .. 127.
INPUT_QMIN, INPUT_QMAX = -128, 127
SCALES = (
    "weight_scale",
    "input_scale",
    "input_offset",
    "smoothing",
)  # Parameters or buffers of prepared layers


def keep_scales(
    layer: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What nn.Module._apply shall call for each tensor of `layer`: `fn`, but the dtype of scales stays what it is."""
    found = [layer._parameters.get(name, layer._buffers.get(name)) for name in SCALES]
    scales = [tensor for scale in found if scale is not None for tensor in (scale, scale.grad)]

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        is_scale = any(tensor is scale for scale in scales)
        return tensor.to(result.device) if is_scale and result.dtype != tensor.dtype else result

    return apply
