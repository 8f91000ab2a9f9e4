# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks, prints Markdown tables and writes a JSON file that says on what machine.

Usage: python benchmarks/run.py [layers] [overhead] [encoder] [--threads N] [--cap avx2] [--keep-memory] [--output FILE]

`--cap avx2` holds Octavo and torch to AVX2, in a process of its own, because torch reads its caps once at start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import octavo
from timing import CAPS, machine

BENCHMARKS = ("layers", "overhead", "encoder")


def table(rows: list[dict[str, object]]) -> str:
    """Rows of one benchmark as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
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
    chosen = parser.parse_args()
    unknown = set(chosen.benchmarks) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    return chosen


def main() -> int:
    chosen = arguments()
    if chosen.cap and any(os.environ.get(name) != value for name, value in CAPS.items()):
        return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **CAPS}).returncode
    torch.set_num_threads(chosen.threads)
    results: dict[str, Any] = {"machine": machine()}
    if chosen.keep_memory and octavo.keep_memory():
        results["machine"]["malloc"] = "keep_memory"
    print(json.dumps(results["machine"], indent=2))
    for name in chosen.benchmarks or BENCHMARKS:
        rows = __import__(name).measure()
        results[name] = rows
        print(f"\n## {name}\n\n{table(rows)}", flush=True)
    chosen.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
