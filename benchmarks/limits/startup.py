# SPDX-License-Identifier: Apache-2.0
"""What comes before the first output: packing a weight, quantizing a layer, loading a saved model.

Loading is timed to the first output, so that what is put off (packing, reading mapped files) counts. Files are in the
page cache.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import octavo
from octavo import ops
from octavo.lab.bench import quantize_dynamic, random_linear
from octavo.runtime.timing import interleaved
from timing import milliseconds


def make_model(features: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(features, features) for _ in range(layers))).requires_grad_(False)


def packing(features: int) -> dict[str, Callable[[], object]]:
    """One weight of features x features."""
    linear = random_linear(features, features)
    codes = octavo.quantize(linear.weight, granularity=octavo.PerChannel(0)).codes
    return {
        "copy of the int8 weight": codes.clone,
        "pack_weight": partial(ops.pack_weight, codes),
        "quantized(linear)": partial(octavo.quantized, linear, octavo.Int8Dynamic()),
        "quantize_dynamic(linear)": partial(quantize_dynamic, linear),
    }


def loading(folder: Path, features: int, layers: int) -> dict[str, Callable[[], object]]:
    """From files in `folder`, which are written here, to the first output."""
    model, x = make_model(features, layers), torch.randn(1, features)
    octavo.save(octavo.quantized(model, octavo.Int8Dynamic()), folder / "int8")
    torch.save(model.state_dict(), folder / "fp32.pt")
    torch.save(quantize_dynamic(model), folder / "quantize_dynamic.pt")
    del model

    def skeleton() -> nn.Sequential:
        with torch.device("meta"):
            return make_model(features, layers)

    def load_fp32() -> torch.Tensor:
        loaded = skeleton()
        loaded.load_state_dict(torch.load(folder / "fp32.pt", mmap=True), assign=True)
        return loaded(x)

    return {
        "octavo.load": lambda: octavo.load(folder / "int8", skeleton())(x),
        "torch.load, fp32": load_fp32,
        "torch.load, quantize_dynamic": lambda: torch.load(
            folder / "quantize_dynamic.pt", weights_only=False
        )(x),
    }


def measure(features: int = 4096, layers: int = 8, rounds: int = 7) -> list[dict[str, object]]:
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch.load's own
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        runs = {f"one layer: {name}": run for name, run in packing(features).items()}
        runs |= {
            f"{layers} layers: {name}": run for name, run in loading(Path(folder), features, layers).items()
        }
        times = interleaved(runs, rounds=rounds)
    return [{"what": name, "features": features} | milliseconds(taken) for name, taken in times.items()]
