# SPDX-License-Identifier: Apache-2.0
"""`octavo bench`: how fast Octavo's layers are on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ._types import positive_count

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.lab.bench import BenchResult, LayerResult

HELP = "time Octavo's layers against torch fp32 and quantize_dynamic on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=positive_count, default=1, help="torch threads (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive_count, default=11, help="turns of each candidate (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from octavo.lab.bench import bench
    from octavo.runtime.timing import torch_threads

    errors = Console(stderr=True)
    with torch_threads(options.threads), errors.status("Measuring, less than a minute ...") as status:
        result = bench(
            rounds=options.rounds,
            on_layer=lambda layer: status.update(
                f"{layer.in_features} x {layer.out_features}, {layer.batch} rows: done"
            ),
        )
    if options.json:
        json.dump(result.to_dict(), sys.stdout, indent=1)
        print()
    else:
        machine = result.machine
        console = Console(highlight=False)
        console.print(
            f"{machine['cpu']}: {machine['active_isa']}, threads {machine['threads']}, torch {machine['torch']}"
        )
        console.print(_table(result))


def _table(result: BenchResult) -> Table:
    """A line for each layer and batch: milliseconds, and how many times as fast as torch fp32; errors in the last."""
    from rich import box
    from rich.table import Table

    caption = "median milliseconds, times as fast as torch fp32; error relative to float64"
    lines = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_footer=True, caption=caption)
    lines.add_column("layer", justify="right", no_wrap=True, footer="error")
    lines.add_column("rows", justify="right", no_wrap=True)
    for index, found in enumerate(result.layers[0].measurements):
        errors = [layer.measurements[index].relative_error or 0.0 for layer in result.layers]
        header = found.candidate.replace(" ", "\n").replace("_", "_\n")
        lines.add_column(header, justify="right", no_wrap=True, footer=f"{max(errors):.1e}")
    previous = ""
    for layer in result.layers:
        shape = f"{layer.in_features} x {layer.out_features}"
        if previous not in ("", shape):
            lines.add_section()
        lines.add_row("" if shape == previous else shape, str(layer.batch), *cells(layer))
        previous = shape
    return lines


def cells(layer: LayerResult) -> list[str]:
    fp32 = layer["torch fp32"].times
    texts = []
    for found in layer.measurements:
        if found.times is None:
            texts.append(found.failure)
        elif found.times is fp32 or fp32 is None:
            texts.append(f"{found.times.median * 1e3:.3g}")
        else:
            texts.append(f"{found.times.median * 1e3:.3g} {fp32.median / found.times.median:5.1f}x")
    return texts
