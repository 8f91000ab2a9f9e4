# SPDX-License-Identifier: Apache-2.0
"""One linear layer: Octavo on every instruction set against every rival that is installed.

A time holds all that a call does: the quantization of the rows, the product, scales and bias. Warm: the same weights in
every call. Cold: a rotating set of copies, together three times the last-level cache, so that weights come from memory.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo
import rivals
from limits.ceilings import fastest_seconds
from octavo.lab.bench import (
    LayerCandidate,
    Measurement,
    exact_linear,
    measure_candidates,
    octavo_candidates,
    random_linear,
)
from octavo.schemes import label
from timing import milliseconds

Row = dict[str, Any]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
COLD_BATCHES = 16  # above, arithmetic hides where the weights come from
COLD_RIVALS = ("torch fp32", "quantize_dynamic")


@dataclass(frozen=True)
class Plan:
    """Which cells to measure, and how long.

    shapes     (in_features, out_features); rivals: names or files of rivals/, empty for all
    rounds, seconds, limit   of octavo.runtime.timing.interleaved
    """

    shapes: tuple[tuple[int, int], ...] = (
        (384, 1536),
        (768, 3072),
        (1024, 1024),
        (4096, 4096),
        (4096, 11008),
    )
    batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    dtypes: tuple[str, ...] = ("f32", "bf16")
    weights: tuple[str, ...] = ("warm", "cold")
    rivals: tuple[str, ...] = ()
    rounds: int = 15
    seconds: float = 0.02
    limit: float = 0.5


QUICK = Plan(
    shapes=((1024, 1024), (4096, 4096)),
    batches=(1, 16, 256),
    dtypes=("f32",),
    weights=("warm",),
    rivals=("fp32", "quantize_dynamic", "int_mm", "onnxruntime dynamic"),
    rounds=7,
    limit=0.2,
)


def schemes() -> list[octavo.schemes.Scheme]:
    return [octavo.Int8Dynamic(), octavo.Int8WeightOnly(), octavo.HalfWeightOnly()]


def isas() -> list[str]:
    """Those that serve users, slowest first: up to the active one, and scalar only if that is all there is."""
    info = octavo.cpu_info()
    within = info.isas[: info.isas.index(info.active) + 1]
    return [isa for isa in within if isa != "scalar"] or ["scalar"]


def measure_plan(
    plan: Plan, ceilings: dict[str, Any], on_table: Callable[[list[Row]], None] = lambda rows: None
) -> tuple[list[Row], list[str]]:
    """A row for each cell and candidate, and the rivals that were skipped. Progress goes to stderr.

    on_table   gets all rows so far after each layer, dtype and kind of weights: the whole takes a quarter of an hour
    """
    chosen, skipped = rivals.available(list(plan.rivals))
    rows = []
    for (in_features, out_features), dtype in itertools.product(plan.shapes, plan.dtypes):
        linear = random_linear(in_features, out_features, DTYPES[dtype])
        for weights in plan.weights:
            start = time.perf_counter()
            measured = warm(linear, chosen, plan) if weights == "warm" else cold(linear, chosen, plan)
            for batch, measurement in measured:
                cell = {"in_features": in_features, "out_features": out_features, "batch": batch}
                cell |= {"dtype": dtype, "weights": weights}
                rows.append(cell | row_of(measurement, chosen) | shares(measurement, cell, ceilings))
            on_table(rows)
            seconds = time.perf_counter() - start
            print(f"{in_features} x {out_features} {dtype} {weights}: {seconds:.0f} s", file=sys.stderr)
            gc.collect()
    return rows, skipped


def row_of(measurement: Measurement, chosen: list[rivals.Rival]) -> Row:
    as_accurate = {rival.name: rival.as_accurate for rival in chosen}
    row: Row = {"candidate": measurement.candidate, "isa": measurement.isa}
    row["as_accurate"] = as_accurate.get(measurement.candidate, True)
    if measurement.times is None:
        return {**row, "failure": measurement.failure}
    return {**row, **milliseconds(measurement.times), "relative_error": measurement.relative_error}


def shares(measurement: Measurement, cell: Row, ceilings: dict[str, Any]) -> Row:
    """gops: 10^9 operations per second, a multiplication and an addition being two. share: of the roofline of its
    instruction set; rivals are held to that of the active one, in int8."""
    if measurement.times is None:
        return {}
    shape, batch, median = (
        (cell["in_features"], cell["out_features"]),
        cell["batch"],
        measurement.times.median,
    )
    found: Row = {"gops": 2 * batch * shape[0] * shape[1] / median / 1e9}
    isa = measurement.isa or octavo.cpu_info().active
    is_float = measurement.candidate.startswith("octavo Half")  # the ceilings are those of int8
    if isa in ceilings.get("gops", {}) and not is_float:
        cold = cell["weights"] == "cold"
        found["share"] = fastest_seconds(ceilings, isa, shape, batch, cold) / median
    return found


def warm(linear: nn.Linear, chosen: list[rivals.Rival], plan: Plan) -> Iterator[tuple[int, Measurement]]:
    """Each rival is built once for all batches, and again only if it serves few."""
    dtype = linear.weight.dtype
    ours = octavo_candidates(linear, schemes(), isas())
    built = {rival.name: candidate_of(rival, linear) for rival in chosen if not rival.batches}
    for batch in plan.batches:
        theirs = [
            built.get(rival.name) or candidate_of(rival, linear)
            for rival in chosen
            if rival.takes(dtype, batch)
        ]
        x = torch.randn(batch, linear.in_features).to(dtype)
        for measurement in timed(theirs + ours, linear, x, plan):
            yield batch, measurement


def candidate_of(rival: rivals.Rival, linear: nn.Linear, copies: int = 1) -> LayerCandidate:
    """If it cannot be built, the candidate raises why when it is run."""
    try:
        with torch.inference_mode():
            layers = [rival.build(linear) for _ in range(copies)]
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"

        def fail(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"cannot be built: {failure}")

        return LayerCandidate(rival.name, fail)
    return LayerCandidate(rival.name, layers[0] if copies == 1 else rotating(layers))


def rotating(layers: list[rivals.Run]) -> rivals.Run:
    """Calls one layer after the other: no weight is met again before all others were read."""
    order = itertools.cycle(layers)
    return lambda x: next(order)(x)


def cold(linear: nn.Linear, chosen: list[rivals.Rival], plan: Plan) -> Iterator[tuple[int, Measurement]]:
    dtype, count = linear.weight.dtype, linear.weight.numel()
    copies = 2 + 3 * last_level_cache() // count  # int8: the same number makes fp32 four times as large
    theirs = [
        candidate_of(rival, linear, copies)
        for rival in chosen
        if rival.name in COLD_RIVALS and rival.takes(dtype, 1)
    ]
    ours = []
    for scheme in schemes():
        layers: list[rivals.Run] = [octavo.quantized(linear, scheme) for _ in range(copies)]
        ours += [LayerCandidate(f"octavo {label(scheme)}", rotating(layers), isa) for isa in isas()]
    for batch in plan.batches:
        if batch <= COLD_BATCHES:
            x = torch.randn(batch, linear.in_features).to(dtype)
            for measurement in timed(theirs + ours, linear, x, plan):
                yield batch, measurement


def last_level_cache() -> int:
    """Bytes; 32 MB if the system does not say."""
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in levels]
    return max(sizes, default=32 << 20)


def timed(
    candidates: list[LayerCandidate], linear: nn.Linear, x: torch.Tensor, plan: Plan
) -> list[Measurement]:
    exact = exact_linear(linear, x)
    return measure_candidates(
        candidates, x, exact, rounds=plan.rounds, seconds=plan.seconds, limit=plan.limit
    )
