# SPDX-License-Identifier: Apache-2.0
"""What each scheme costs at run time on one linear layer, as multiples of Int8Dynamic: the times in docs/methods.md.

Usage: python -m suites.methods, run in benchmarks/

Six channels of the input are twenty times the others; one thread; fp32 in and out, weights warm. `train` is one step of
forward and backward through a prepared layer, as a multiple of the float layer's.
"""

from __future__ import annotations

import torch
from torch import nn

import octavo
from octavo.runtime.timing import cpu_name, interleaved

K = N = 2048
BATCHES = [1, 8, 64, 512]
SCHEMES = {
    "Int8Dynamic()": octavo.Int8Dynamic(),
    "Int8WeightOnly()": octavo.Int8WeightOnly(),
    "Int8Static()": octavo.Int8Static(),
    "SmoothQuant(), not folded": octavo.Int8Dynamic(
        method=octavo.SmoothQuant()
    ),  # a bare layer has nothing before it
    "LLMInt8(1e9), no columns": octavo.LLMInt8(1e9),
    "LLMInt8(10.0), six columns": octavo.LLMInt8(10.0),
}


def rows(m: int) -> torch.Tensor:
    x = torch.randn(m, K).clamp(-4, 4)
    x[:, :6] *= 20
    return x


def run_times(linear: nn.Linear) -> None:
    layers = {name: octavo.quantized(linear, scheme, data=rows(512)) for name, scheme in SCHEMES.items()}
    for m in BATCHES:
        x = rows(m)
        runs = {name: lambda f=f, x=x: f(x) for name, f in {"torch fp32": linear, **layers}.items()}
        with torch.inference_mode():
            times = interleaved(runs, rounds=25)
        unit = times["Int8Dynamic()"].best
        print(f"m = {m}: " + ", ".join(f"{name} {time.best / unit:.2f}" for name, time in times.items()))


def training_times(linear: nn.Linear) -> None:
    x = rows(512)
    layers: dict[str, nn.Module] = {"float": linear.requires_grad_()}
    for learn in (False, True):
        name = "learned scales" if learn else "straight through"
        layers[name] = octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4)).prepare_linear(
            linear, learn_scales=learn
        )
    times = interleaved({name: lambda f=f: f(x).sum().backward() for name, f in layers.items()})
    unit = times["float"].best
    print("train: " + ", ".join(f"{name} {time.best / unit:.2f}" for name, time in times.items()))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{cpu_name()}, {octavo.cpu_info().active}, {K} x {N}")
    layer = nn.Linear(K, N).requires_grad_(False)
    run_times(layer)
    training_times(layer)
