# SPDX-License-Identifier: Apache-2.0
"""torch's fused transformer layers go around the modules they are made of; this file makes them call ours.

In eval mode nn.TransformerEncoderLayer hands `linear1.weight` to one fused float operator. On a quantized layer that
would be a dequantized copy at every call: not wrong, but slow, and nothing would be computed in integers. A prepared
layer would see nothing of its input.
"""

from __future__ import annotations

from torch import nn

from .linear import QuantLinear
from .prepared import PreparedLinear


def leave_fused_paths(model: nn.Module) -> None:
    """Switches the fused path off in every nn.TransformerEncoderLayer of `model` that has a layer of ours inside."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if not any(isinstance(inner, QuantLinear | PreparedLinear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch reads it for nothing else
        else:
            module.use_nested_tensor = False  # nested tensors exist only for the fused path
