# SPDX-License-Identifier: Apache-2.0
"""What a call costs before any arithmetic: a 64 x 64 layer with one row."""

from __future__ import annotations

import torch
from torch import nn

import octavo
from layers import quantize_dynamic
from octavo.timing import interleaved


def measure(rounds: int = 15) -> list[dict[str, object]]:
    """Microseconds per call."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(1, 64)
    layers = {
        "torch fp32": linear,
        "quantize_dynamic": quantize_dynamic(linear),
        "octavo Int8Dynamic": octavo.quantized(linear, octavo.Int8Dynamic()),
        "octavo Int8WeightOnly": octavo.quantized(linear, octavo.Int8WeightOnly()),
    }
    with torch.inference_mode():
        times = interleaved(
            {name: lambda layer=layer: layer(x) for name, layer in layers.items()}, rounds=rounds
        )
    return [
        {"candidate": name, "best_us": taken.best * 1e6, "median_us": taken.median * 1e6}
        for name, taken in times.items()
    ]
