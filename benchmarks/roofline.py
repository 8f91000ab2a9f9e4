# SPDX-License-Identifier: Apache-2.0
"""A picture of the layers: what the instruction and the memory allow, where Octavo and each rival stand.

One panel for each layer. Operations per byte of int8 weight are twice the rows of x, so one axis shows both. The slope
is the weight read once per call from where it lies, the plateau the multiply instruction on registers alone.

Usage: python benchmarks/roofline.py results.json [picture.png]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from limits.ceilings import fastest_seconds
from tables import OURS

Row = dict[str, Any]
Points = dict[str, list[tuple[int, float]]]

TICKS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000]
INK, QUIET = "#1f2933", "#9aa5b1"
# Octavo's instruction sets, the fastest first: from dark to light blue.
BLUES = ["#0b4a82", "#4a9bd9", "#9ccbee", "#c9e2f5"]
# Rivals worth a colour of their own, in the order of the legend. The others are grey.
COLORS = {
    "torch fp32": ("#6b7280", "s"),
    "torch bf16": ("#a16207", "D"),
    "quantize_dynamic": ("#d9480f", "^"),
    "int_mm": ("#b4438f", "v"),
    "torchao dynamic, compiled": ("#2b8a3e", "P"),
    "onnxruntime dynamic per channel": ("#7048e8", "X"),
    "openvino int8 weights": ("#0c8599", "h"),
}


def points_of(rows: list[Row]) -> Points:
    """Name -> (rows of x, GOPS)."""
    found: Points = {}
    for row in rows:
        if "gops" in row and (not row["candidate"].startswith(OURS) or "Int8Dynamic" in row["candidate"]):
            name = f"{row['candidate']}, {row['isa']}" if row["isa"] else row["candidate"]
            found.setdefault(name, []).append((row["batch"], row["gops"]))
    return {name: sorted(points) for name, points in found.items()}


def draw_ceilings(axes: Any, ceilings: dict[str, Any], shape: tuple[int, int], batches: list[int]) -> None:
    """A roof for each instruction set; they share the slope."""
    low, high = math.log10(batches[0]), math.log10(batches[-1])
    fine = [10 ** (low + (high - low) * step / 200) for step in range(201)]
    for isa, gops in ceilings["gops"].items():
        roof = [
            2 * batch * shape[0] * shape[1] / fastest_seconds(ceilings, isa, shape, batch, False) / 1e9
            for batch in fine
        ]
        axes.plot(fine, roof, color=INK, linewidth=1.1, zorder=2)
        axes.annotate(
            f"{isa}\n{gops / 1000:.2f} TOPS",
            (batches[-1], gops),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=INK,
        )


def draw_points(axes: Any, points: Points) -> None:
    ours = [name for name in points if name.startswith(OURS)]
    for name, line in points.items():
        batches, gops = zip(*line, strict=True)
        if name in ours:
            color = BLUES[min(len(ours) - 1 - ours.index(name), len(BLUES) - 1)]
            axes.plot(batches, gops, "o-", color=color, label=name, linewidth=2, markersize=5.5, zorder=5)
        elif name in COLORS:
            color, marker = COLORS[name]
            axes.plot(
                batches,
                gops,
                marker=marker,
                color=color,
                label=name,
                linewidth=0.9,
                markersize=4.5,
                alpha=0.9,
                zorder=4,
            )
        else:
            axes.plot(batches, gops, ".-", color=QUIET, linewidth=0.6, markersize=3.5, alpha=0.6, zorder=3)


def style(axes: Any, title: str, batches: list[int], top: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlim(batches[0] / 1.3, batches[-1] * 6)  # room for the names of the roofs
    axes.set_ylim(top / 100, top * 1.5)
    axes.set_title(title, fontsize=10, loc="left", color=INK, fontweight="bold")
    axes.grid(True, color="#e4e7eb", linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def plot(results: dict[str, Any], path: Path, dtype: str = "f32") -> bool:
    """Writes a PNG of the layers with warm weights. False if there are no layers or no ceilings to draw.

    raises   ImportError without matplotlib
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results.get("layers", []) if (row["dtype"], row["weights"]) == (dtype, "warm")]
    ceilings = results.get("ceilings")
    if not rows or not ceilings:
        return False
    shapes = list(dict.fromkeys((row["in_features"], row["out_features"]) for row in rows))
    batches = sorted({row["batch"] for row in rows})
    columns = min(3, len(shapes) + 1)
    lines = math.ceil((len(shapes) + 1) / columns)  # one panel more, for the legend
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.4 * columns, 3.7 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for axes, shape in zip(panels, shapes, strict=False):
        draw_ceilings(axes, ceilings, shape, batches)
        draw_points(
            axes, points_of([row for row in rows if (row["in_features"], row["out_features"]) == shape])
        )
        style(axes, f"{shape[0]} x {shape[1]}", batches, max(ceilings["gops"].values()))
    finish(figure, panels, len(shapes), results["machine"])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def finish(figure: Any, panels: list[Any], used: int, machine: dict[str, Any]) -> None:
    """Title, axis labels, and the legend in the first free panel."""
    from matplotlib.lines import Line2D

    handles, labels = panels[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: not labels[index].startswith(OURS))
    handles = [handles[index] for index in order]
    labels = [labels[index] for index in order]
    handles += [
        Line2D([], [], color=QUIET, marker=".", linewidth=0.6),
        Line2D([], [], color=INK, linewidth=1.1),
    ]
    labels += ["other rivals; the slowest lie below", "what instruction and memory allow"]
    for axes in panels[used:]:
        axes.axis("off")
    panels[used].legend(handles, labels, loc="center left", frameon=False, fontsize=8.5, labelcolor=INK)
    figure.suptitle(
        f"One linear layer, float32 in and out, {machine['cpu']}, threads: {machine['threads']}",
        x=0.01,
        ha="left",
        fontsize=12,
        color=INK,
    )
    figure.supxlabel("rows of x   (operations per byte of int8 weight: twice as many)", fontsize=9, color=INK)
    figure.supylabel("10⁹ operations per second", fontsize=9, color=INK)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    sys.exit(0 if plot(json.loads(source.read_text()), target) else 1)
