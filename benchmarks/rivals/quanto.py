# SPDX-License-Identifier: Apache-2.0
"""optimum-quanto: int8 weights with float activations, and with activations of one scale chosen on random data."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("optimum.quanto",)


def weights(linear: nn.Linear) -> Run:
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(deepcopy(linear))
    quantize(model, weights=qint8)
    freeze(model)
    return model


def weights_and_activations(linear: nn.Linear) -> Run:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = nn.Sequential(deepcopy(linear))
    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        model(torch.randn(256, linear.in_features, dtype=linear.weight.dtype))
    freeze(model)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        return y.dequantize() if hasattr(y, "dequantize") and type(y) is not torch.Tensor else y

    return run


BOTH = (torch.float32, torch.bfloat16)
RIVALS = [
    Rival("quanto weights", weights, True, BOTH),
    Rival("quanto weights and activations", weights_and_activations, False),
]
