# SPDX-License-Identifier: Apache-2.0
"""One linear layer: Octavo against torch fp32 and quantize_dynamic (engine x86), fp32 in and out, weights warm.

Octavo's time holds everything: the quantization of each row, the product, scales and bias.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

import octavo
from octavo.timing import interleaved
from timing import figures

SHAPES = [(384, 1536), (1024, 1024), (4096, 4096)]  # (in_features, out_features)
BATCHES = [1, 4, 16, 64, 256, 1024]
SCHEMES = [octavo.Int8Dynamic(), octavo.Int8Dynamic(symmetric=False), octavo.Int8WeightOnly()]


def quantize_dynamic(model: nn.Module) -> nn.Module:
    """A copy by torch.ao: 7-bit, per-tensor activations; the fastest int8 layers of eager PyTorch."""
    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(model), {nn.Linear}, dtype=torch.qint8)[0]


def on_isa(isa: str, layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with octavo.use_isa(isa):
            return layer(x)

    return run


def candidates(linear: nn.Linear, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    rival = quantize_dynamic(linear)
    runs: dict[str, Callable[[], object]] = {
        "torch fp32": lambda: linear(x),
        "quantize_dynamic": lambda: rival(x),
    }
    for scheme in SCHEMES:
        layer = octavo.quantized(linear, scheme)
        runs[f"octavo {scheme}"] = lambda layer=layer: layer(x)
    dynamic = octavo.quantized(linear, octavo.Int8Dynamic())
    active = octavo.cpu_info().active
    for isa in octavo.cpu_info().isas:
        if isa not in ("scalar", active):
            runs[f"octavo Int8Dynamic() {isa}"] = on_isa(isa, dynamic, x)
    return runs


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def measure(rounds: int = 15) -> list[dict[str, object]]:
    """One row for each shape, batch and candidate: milliseconds (best, median), error against float64."""
    torch.manual_seed(0)
    rows = []
    for in_features, out_features in SHAPES:
        linear = nn.Linear(in_features, out_features).requires_grad_(False)
        for batch in BATCHES:
            x = torch.randn(batch, in_features)
            exact = x.double() @ linear.weight.double().T + linear.bias.double()
            runs = candidates(linear, x)
            with torch.inference_mode():
                times = interleaved(runs, rounds=rounds)
                errors = {name: relative_error(run(), exact) for name, run in runs.items()}
            for name in times:
                rows.append(
                    {
                        "in_features": in_features,
                        "out_features": out_features,
                        "batch": batch,
                        "candidate": name,
                        **figures(times, name),
                        "relative_error": errors[name],
                    }
                )
    return rows
