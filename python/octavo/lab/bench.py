# SPDX-License-Identifier: Apache-2.0
"""How fast Octavo's layers are on this machine: `octavo bench`, and what benchmarks/ builds on.

Candidates take turns on one layer at a time, with random data, and beside each time stands the error against float64:
a fast layer that is wrong is not fast. benchmarks/ adds rivals, ceilings and cold weights to the same measurement.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..conversion.convert import quantized
from ..metrics import relative_error
from ..runtime.cpu import use_isa
from ..runtime.timing import Times, interleaved, machine
from ..schemes import Scheme, label
from ..schemes.int8_dynamic import Int8Dynamic
from ..schemes.int8_weight_only import Int8WeightOnly

SHAPES = ((384, 1536), (1024, 1024), (4096, 4096))  # (in_features, out_features)
BATCHES = (1, 16, 256)


@dataclass(frozen=True)
class LayerCandidate:
    """One way to compute a layer: its name, x -> y, and the instruction set to run it on (empty: the active one)."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    isa: str = ""


@dataclass(frozen=True)
class Measurement:
    """One candidate on one input. Times in seconds; relative_error is |y - exact| / |exact|, exact in float64.

    failure   why there is no time: what the candidate raised
    """

    candidate: str
    isa: str
    times: Times | None
    relative_error: float | None
    failure: str = ""


@dataclass(frozen=True)
class LayerResult:
    """All candidates on one layer with one batch."""

    in_features: int
    out_features: int
    batch: int
    measurements: tuple[Measurement, ...]

    def __getitem__(self, candidate: str) -> Measurement:
        return next(found for found in self.measurements if found.candidate == candidate)


@dataclass(frozen=True)
class BenchResult:
    """What `bench` returns; to_dict() is JSON."""

    machine: dict[str, object]
    layers: tuple[LayerResult, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    *,
    rounds: int = 11,
    on_layer: Callable[[LayerResult], None] = lambda result: None,
) -> BenchResult:
    """Times Int8Dynamic and Int8WeightOnly against torch's fp32 and quantize_dynamic, with float32 in and out.

    shapes, batches   (in_features, out_features) and rows of x; the defaults take less than a minute
    on_layer          called with each result as soon as it is there
    source            ours
    """
    results = []
    for in_features, out_features in shapes:
        linear = random_linear(in_features, out_features)
        candidates = [
            LayerCandidate("torch fp32", linear),
            LayerCandidate("quantize_dynamic", quantize_dynamic(linear)),
            *octavo_candidates(linear, (Int8Dynamic(), Int8WeightOnly())),
        ]
        for batch in batches:
            x = torch.randn(batch, in_features)
            measured = measure_candidates(candidates, x, exact_linear(linear, x), rounds=rounds, limit=1.0)
            results.append(LayerResult(in_features, out_features, batch, tuple(measured)))
            on_layer(results[-1])
    return BenchResult(machine(), tuple(results))


def measure_candidates(
    candidates: Sequence[LayerCandidate],
    x: torch.Tensor,
    exact: torch.Tensor,
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    limit: float = 1.0,
) -> list[Measurement]:
    """Times all candidates on `x` in turns (`runtime.timing.interleaved`). One that raises is kept with its failure."""
    errors: dict[int, float] = {}
    failures: dict[int, str] = {}
    with torch.inference_mode():
        for index, candidate in enumerate(candidates):
            try:
                with _on_isa(candidate):
                    errors[index] = relative_error(exact, candidate.run(x).double())
            except Exception as error:
                failures[index] = f"{type(error).__name__}: {error}".splitlines()[0]
        times = interleaved(
            {str(index): partial(candidates[index].run, x) for index in errors},
            rounds=rounds,
            seconds=seconds,
            limit=limit,
            contexts={str(index): partial(_on_isa, candidates[index]) for index in errors},
        )
    return [
        Measurement(
            candidate.name, candidate.isa, times.get(str(index)), errors.get(index), failures.get(index, "")
        )
        for index, candidate in enumerate(candidates)
    ]


def _on_isa(candidate: LayerCandidate) -> AbstractContextManager[None]:
    return use_isa(candidate.isa) if candidate.isa else nullcontext()


def random_linear(in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)


def exact_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the layer gives for x, computed in float64."""
    return x.double() @ linear.weight.double().T + linear.bias.double()


def octavo_candidates(
    linear: nn.Linear, schemes: Sequence[Scheme], isas: Sequence[str] = ("",)
) -> list[LayerCandidate]:
    """One layer for each scheme, and a candidate for each instruction set it is to run on."""
    found = []
    for scheme in schemes:
        layer = quantized(linear, scheme)
        found += [LayerCandidate(f"octavo {label(scheme)}", layer, isa) for isa in isas]
    return found


def quantize_dynamic(model: nn.Module, engine: str = "x86", per_channel: bool = False) -> nn.Module:
    """A float32 copy of `model`, which may be a bare nn.Linear, by `quantize_dynamic_`."""
    return quantize_dynamic_(nn.Sequential(deepcopy(model)).float(), engine, per_channel)[0]


def quantize_dynamic_(model: nn.Module, engine: str = "x86", per_channel: bool = False) -> Any:
    """Quantizes in place by torch.ao, the fastest int8 of eager PyTorch: 7 bits under x86, one scale for all of x."""
    torch.backends.quantized.engine = engine
    ao = torch.ao.quantization
    config = ao.per_channel_dynamic_qconfig if per_channel else ao.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and per-channel observers say more
        return ao.quantize_dynamic(model, {nn.Linear: config}, inplace=True)
