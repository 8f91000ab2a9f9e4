# SPDX-License-Identifier: Apache-2.0
"""One linear layer in few bits and in groups: every scheme of ours in turns with every rival, in one process.

The float weight is Student's t with 5 degrees of freedom, as heavy-tailed as those of trained models; errors, against
float64 with that weight, stand beside those of a Gaussian one. Input and output are float32: casts are part of a call.

Usage: python benchmarks/run.py low_bits, or by itself, run in benchmarks/
       python -m suites.low_bits [--shapes 4096x4096] [--batches 1,16] [--only NAME ...] [--output FILE.json]
       python -m suites.low_bits held NAME    bytes for each weight that one layer holds, in a process of its own
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo
import rivals
from limits.memory import in_use
from octavo.lab import bench
from octavo.schemes import by_name, label
from suites.layers import candidate_of
from timing import machine, milliseconds

Row = dict[str, Any]
FOLDER = Path(__file__).resolve().parents[1]

# Names as the command line has them; those that this version does not know are skipped, and it is said.
SCHEMES = (
    "int8-dynamic",
    "int8-dynamic:group_size=32",
    "int8-dynamic:activation_group_size=32",
    "int8-weight-only",
    "int4-dynamic",
    "int4-dynamic:group_size=128",
    "int4-weight-only",
    "int4-weight-only:bits=3",
    "int4-weight-only:bits=2",
    "nf4",
    "half-weight-only",
)
HELD = (4096, 4096)  # the layer whose memory is measured: large beside what a package keeps for itself
DISTRIBUTIONS = {
    "t5": torch.distributions.StudentT(5.0, 0.0, (3 / 5) ** 0.5),  # of variance 1
    "Gaussian": torch.distributions.Normal(0.0, 1.0),
}


@dataclass(frozen=True)
class Plan:
    """Shapes (in_features, out_features), rows of x, and names of candidates, or all.

    rounds, seconds, limit   of octavo.runtime.timing.interleaved
    """

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (1536, 384), (1024, 2816), (576, 1536))
    batches: tuple[int, ...] = (1, 4, 16, 256)
    only: tuple[str, ...] = ()
    rounds: int = 15
    seconds: float = 0.02
    limit: float = 0.5
    memory: bool = True


def measure() -> list[Row]:
    """For run.py: all of it."""
    rows, skipped = measure_plan(Plan())
    print(*skipped, sep="\n", file=sys.stderr)
    return rows


def ours(name: str) -> rivals.Rival:
    """A scheme of ours, built as a rival is."""
    scheme = by_name(name)
    return rivals.Rival(f"octavo {label(scheme)}", partial(octavo.quantized, scheme=scheme), True)


def contestants(only: Sequence[str] = ()) -> tuple[list[rivals.Rival], list[str]]:
    """Ours, then the others, and a line for each that is skipped."""
    found, skipped = [], []
    for name in SCHEMES:
        try:
            found.append(ours(name))
        except ValueError as error:
            skipped.append(f"{name}: {error}".splitlines()[0])
    theirs, missing = rivals.available(kind="LOW_BITS")
    everyone = found + theirs
    return [each for each in everyone if not only or each.name in only], skipped + missing


def linear_of(shape: tuple[int, int], distribution: str) -> nn.Linear:
    """Outputs have variance 1 if inputs have."""
    in_features, out_features = shape
    linear = nn.Linear(in_features, out_features)
    linear.weight.data = DISTRIBUTIONS[distribution].sample((out_features, in_features)) * in_features**-0.5
    return linear.requires_grad_(False)


def measure_plan(plan: Plan) -> tuple[list[Row], list[str]]:
    """A row for each layer, number of rows and candidate, and what was skipped. Progress goes to stderr."""
    chosen, skipped = contestants(plan.only)
    held = {each.name: held_by(each.name) for each in chosen} if plan.memory else {}
    rows = []
    for shape in plan.shapes:
        errors = gaussian_errors(chosen, shape)
        linear = linear_of(shape, "t5")
        candidates = [candidate_of(each, linear) for each in chosen]
        for batch in plan.batches:
            x = torch.randn(batch, shape[0])
            found = bench.measure_candidates(
                candidates,
                x,
                bench.exact_linear(linear, x),
                rounds=plan.rounds,
                seconds=plan.seconds,
                limit=plan.limit,
            )
            for each in found:
                row: Row = {"in_features": shape[0], "out_features": shape[1], "batch": batch}
                row |= {"candidate": each.candidate}
                if each.times is None:
                    rows.append(row | {"failure": each.failure})
                    continue
                row |= milliseconds(each.times) | {"relative_error": each.relative_error}
                rows.append(row | errors.get(each.candidate, {}) | held.get(each.candidate, {}))
        print(f"{shape[0]} x {shape[1]} is measured", file=sys.stderr)
    return rows, skipped


def gaussian_errors(chosen: Sequence[rivals.Rival], shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Of those that can be run, by name."""
    linear, x = linear_of(shape, "Gaussian"), torch.randn(64, shape[0])
    exact = bench.exact_linear(linear, x)
    found = {}
    for each in chosen:
        try:
            with torch.inference_mode():
                found[each.name] = {
                    "gaussian_error": bench.relative_error(candidate_of(each, linear).run(x), exact)
                }
        except Exception:
            continue  # measured next, where the failure is kept
    return found


def held_by(name: str) -> dict[str, float]:
    """bytes_per_weight, from a process of its own; nothing if that fails."""
    command = [sys.executable, "-m", "suites.low_bits", "held", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    return {"bytes_per_weight": float(done.stdout.split()[-1])} if done.returncode == 0 else {}


def bytes_per_weight(name: str) -> float:
    """What the process holds more once the layer has run and the float weight is gone."""
    found = next(each for each in contestants([name])[0])
    x = torch.randn(4, HELD[0])
    with torch.inference_mode():
        found.build(linear_of((256, 256), "Gaussian"))(torch.randn(4, 256))  # code, threads, small buffers
        before = in_use()
        linear = linear_of(HELD, "Gaussian")
        run = found.build(linear)
        run(x)
        del linear
        megabytes = in_use() - before
        run(x)  # it was alive until here
    return megabytes * 1e6 / (HELD[0] * HELD[1])


# --- tables ---------------------------------------------------------------------------------------------------------


def page(rows: list[Row]) -> str:
    """A line for each candidate, milliseconds at 1, 4, ... rows in one cell; then where a rival is ahead."""
    shapes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in rows))
    batches = sorted({row["batch"] for row in rows})
    cells = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        mine = [row for row in rows if row["candidate"] == name and "median_ms" in row]
        if not mine:
            continue
        errors = [max(row.get(kind, 0.0) for row in mine) for kind in ("relative_error", "gaussian_error")]
        held = mine[0].get("bytes_per_weight")
        line = [name, " / ".join(f"{error:.2g}" for error in errors), "" if held is None else f"{held:.2f}"]
        for shape in shapes:
            best = {
                row["batch"]: f"{row['best_ms']:.3g}"
                for row in mine
                if (row["in_features"], row["out_features"]) == shape
            }
            line.append(" / ".join(best.get(batch, "-") for batch in batches))
        cells.append(line)
    heads = [f"{k} -> {n}, {' / '.join(map(str, batches))} rows, best ms" for k, n in shapes]
    failures = dict.fromkeys(f"- {row['candidate']}: {row['failure']}" for row in rows if "failure" in row)
    failed = "\n\nFailed:\n" + "\n".join(failures) if failures else ""
    head = ["", "error on t5 / Gaussian", "bytes per weight", *heads]
    return f"{_table(head, cells)}{failed}\n\nA rival at least as accurate is ahead: {ahead(rows)}"


def ahead(rows: list[Row]) -> str:
    """Every cell in which somebody at least as accurate as a scheme of ours takes less time than that scheme, and than
    every scheme of ours at least as accurate: what somebody would lose who chose us."""
    timed = [row for row in rows if "median_ms" in row]
    cells = []
    for cell in dict.fromkeys((row["in_features"], row["out_features"], row["batch"]) for row in timed):
        here = [row for row in timed if (row["in_features"], row["out_features"], row["batch"]) == cell]
        mine = [row for row in here if row["candidate"].startswith("octavo ")]
        for rival in here:
            as_accurate = [row for row in mine if row["relative_error"] <= rival["relative_error"] * 1.02]
            fastest = min(as_accurate, key=lambda row: row["median_ms"], default=None)
            if rival in mine or fastest is None or fastest["median_ms"] <= rival["median_ms"]:
                continue
            ratio = f"{rival['median_ms'] / fastest['median_ms']:.2f}"
            layer = f"{cell[0]} -> {cell[1]}"
            cells.append([layer, str(cell[2]), rival["candidate"], ratio, fastest["candidate"]])
    columns = ["layer", "rows", "rival", "its time / ours", "ours, at least as accurate"]
    return f"\n\n{_table(columns, cells)}" if cells else "nowhere."


def _table(columns: list[str], cells: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("held", nargs="*", metavar="held NAME")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--batches", default="")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    if chosen.held:
        print(bytes_per_weight(chosen.held[1]))
        return
    shapes = tuple(tuple(map(int, text.split("x"))) for text in chosen.shapes.split(",") if text)
    batches = tuple(int(text) for text in chosen.batches.split(",") if text)
    plan = Plan(
        shapes or Plan.shapes,
        batches or Plan.batches,
        tuple(chosen.only),
        chosen.rounds,
        memory=not chosen.no_memory,
    )
    rows, skipped = measure_plan(plan)
    print(page(rows), *skipped, sep="\n")
    if chosen.output:
        import run

        results = {"schema": run.SCHEMA, "machine": machine(), "skipped": skipped, "low_bits": rows}
        chosen.output.write_text(run.as_json(results))


if __name__ == "__main__":
    main()
