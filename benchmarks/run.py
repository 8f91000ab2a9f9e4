# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks and writes FILE.json with what a reader must know of the machine, FILE.md and FILE.png.

Usage: python benchmarks/run.py [layers] [small_ops] ... [--threads N] [--cap avx2] [--output FILE.json]
A part of the layers: --shapes 4096x4096 --batches 1,16 --dtypes f32 --weights warm --rivals fp32,quantize_dynamic

`--cap avx2` holds Octavo and torch to AVX2, in a process of its own, because torch reads its caps once at start.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import octavo
import roofline
import tables
from limits import ceilings
from suites import layers
from timing import CAPS, machine

SCHEMA = 1  # of the JSON; a change that compare.py cannot read makes it 2
# Files of suites/ and limits/ with `measure()`, which returns rows; layers takes its plan as well.
BENCHMARKS = {
    "layers": "suites",
    "attention": "suites",
    "small_ops": "limits",
    "float_ops": "suites",
    "overhead": "limits",
    "startup": "limits",
    "encoder": "suites",
    "decoder": "suites",
    "memory": "limits",
    "fusion": "suites",
    "decoding": "suites",
    "low_bits": "suites",
    "ggml_types": "limits",
}


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmarks", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; all of them if none is named"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cap", choices=["avx2"])
    parser.add_argument(
        "--keep-memory", action="store_true", help="octavo.keep_memory(): no page faults of malloc"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--quick", action="store_true", help="few layers and rivals, about a minute")
    parser.add_argument("--shapes", type=shapes, help="IN x OUT features: 384x1536,4096x4096")
    parser.add_argument("--batches", type=numbers, help="rows of x: 1,16")
    parser.add_argument("--dtypes", type=words, help=f"of {', '.join(layers.DTYPES)}")
    parser.add_argument("--weights", type=words, help="of warm, cold")
    parser.add_argument("--rivals", type=words, help="names or files of benchmarks/rivals; all if not given")
    parser.add_argument("--rounds", type=int, help="turns of each candidate")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure the machine first")
    chosen = parser.parse_args(command)
    unknown = set(chosen.benchmarks) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    return chosen


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [part.split("x") for part in text.split(",")]
    return tuple((int(in_features), int(out_features)) for in_features, out_features in pairs)


def plan_of(chosen: argparse.Namespace) -> layers.Plan:
    """The full or the quick plan, with what the command line says otherwise."""
    plan = layers.QUICK if chosen.quick else layers.Plan()
    given = {field.name: getattr(chosen, field.name, None) for field in dataclasses.fields(plan)}
    return dataclasses.replace(plan, **{name: value for name, value in given.items() if value is not None})


def write(results: dict[str, Any], output: Path) -> None:
    """After every benchmark, so that one that fails does not take the others with it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_json(results))
    output.with_suffix(".md").write_text(tables.report(results))
    try:
        roofline.plot(results, output.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)


def as_json(results: dict[str, Any]) -> str:
    """One line for each row, figures to six digits: a result is read, compared and kept as text."""
    entries = []
    for name, value in results.items():
        lines = json.dumps(value)
        if tables.is_rows(value):
            lines = "[\n  " + ",\n  ".join(json.dumps(_rounded(row)) for row in value) + "\n ]"
        entries.append(f" {json.dumps(name)}: {lines}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def main() -> int:
    chosen = arguments()
    if chosen.cap and any(os.environ.get(name) != value for name, value in CAPS.items()):
        return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **CAPS}).returncode
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {"schema": SCHEMA, "machine": machine(), "skipped": []}
    if chosen.keep_memory and octavo.keep_memory():
        results["machine"]["malloc"] = "keep_memory"
    if not chosen.no_ceilings:
        results["ceilings"] = ceilings.measure(chosen.threads)
    print(json.dumps(results, indent=1))
    for name in chosen.benchmarks or BENCHMARKS:
        if name == "layers":
            results[name], results["skipped"] = layers.measure_plan(
                plan_of(chosen),
                results.get("ceilings", {}),
                lambda rows: write(results | {"layers": rows}, chosen.output),
            )
        else:
            results[name] = importlib.import_module(f"{BENCHMARKS[name]}.{name}").measure()
        print(f"\n{tables.section(name, results)}", flush=True)
        write(results, chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
