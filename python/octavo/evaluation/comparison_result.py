# SPDX-License-Identifier: Apache-2.0
"""What `octavo.compare` found, and its faces: attributes, a dict, a text table, an HTML table and a plot.

Only numbers live here; how they are measured is comparison.py. The figures are defined in metrics/.
"""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..base.plots import new_axes
from ..base.tables import megabytes
from ..metrics import ErrorAccumulator

# Full width of a bar in the HTML table. Int8 layers lie around 35 to 50 dB; float32 itself ends near 140 dB.
FULL_BAR_DB = 60.0


@dataclass(frozen=True)
class LayerComparison:
    """One quantized layer's output against its float counterpart's, over all batches.

    sqnr_db, cosine, max_abs_error: each model computed its own input; earlier layers' errors are included.
    local_sqnr_db: the quantized layer was fed the float model's input; the error is this layer's alone.
    """

    name: str
    sqnr_db: float
    cosine: float
    max_abs_error: float
    local_sqnr_db: float


@dataclass(frozen=True)
class OutputFigures:
    """A model's output against the reference's: all floating-point tensors in it, over all batches, as one vector.

    Source: docs/numerics.md, eq. 12 to 15.
    """

    sqnr_db: float
    cosine: float
    relative_error: float
    max_abs_error: float

    @classmethod
    def of(cls, errors: ErrorAccumulator) -> OutputFigures:
        return cls(errors.sqnr_db, errors.cosine, errors.relative_error, errors.max_abs_error)


@dataclass(frozen=True)
class Comparison:
    """What `octavo.compare` returns.

    layers, in the model's order; output; bytes_before and bytes_after: memory of the reference and the model.
    not_run: quantized layers that no batch reached; they have no figures and are not in `layers`.
    unclear: quantized layers whose values are rescaled against the reference by factors that could not be told; they
    have no figures either.
    notes: what a reader must know to judge the figures, such as the padding that was left out.
    """

    layers: list[LayerComparison]
    output: OutputFigures
    bytes_before: int
    bytes_after: int
    not_run: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def worst(self, n: int = 3) -> list[LayerComparison]:
        """The n layers with the lowest SQNR (propagated inputs), worst first; NaN is worst of all."""
        return sorted(self.layers, key=lambda layer: _rank(layer.sqnr_db))[:n]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers. Equal outputs have SQNR inf, which strict JSON cannot hold."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([len("layer"), len("output"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}   SQNR dB  local dB    cosine  max |error|"]
        for layer in self.layers:
            lines.append(_text_row(layer.name, width, layer, f"{layer.local_sqnr_db:8.2f}"))
        lines.append(_text_row("output", width, self.output, f"{'':8}"))
        return "\n".join(lines + self._notes())

    def _repr_html_(self) -> str:
        cell = "style='text-align:left;padding:2px 10px;white-space:nowrap;'"
        titles = ("layer", "SQNR, dB", "local SQNR, dB", "cosine", "max |error|")
        head = "".join(f"<th {cell}>{title}</th>" for title in titles)
        rows = [_html_row(layer.name, layer, _bar(layer.local_sqnr_db), cell) for layer in self.layers]
        rows.append(_html_row("output", self.output, "", cell))
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self._notes())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}"

    def plot(self, ax: Any = None) -> Any:
        """Draws each layer's SQNR (bar) and local SQNR (dot) on `ax` or a new figure; returns the Axes.

        Nothing is shown or saved: `comparison.plot().figure.savefig("error.png")`. A layer with equal output
        gets no mark.
        Raises: ImportError if matplotlib is missing.
        """
        own_figure = ax is None
        ax = new_axes("Comparison.plot", 8, 1.6 + 0.2 * max(len(self.layers), 3)) if own_figure else ax
        positions = list(range(len(self.layers)))
        propagated = [_finite(layer.sqnr_db) for layer in self.layers]
        local = [_finite(layer.local_sqnr_db) for layer in self.layers]
        ax.barh(
            positions, propagated, color="tab:blue", alpha=0.55, label="propagated: each model's own inputs"
        )
        ax.plot(
            local, positions, "o", color="tab:orange", markersize=4, label="local: the float model's inputs"
        )
        ax.set_yticks(positions, [layer.name for layer in self.layers], fontsize=7)
        ax.invert_yaxis()
        ax.margins(y=0.01)
        ax.set_xlabel("SQNR of the layer's output, dB (higher is closer to float)")
        title = f"model output: {self.output.sqnr_db:.1f} dB, cosine {self.output.cosine:.5f}"
        ax.set_title(title, fontsize=10, loc="left")
        if own_figure:
            ax.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        else:
            ax.legend(fontsize=8)
        return ax

    def _notes(self) -> list[str]:
        notes = [f"memory: {megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)}"]
        if self.not_run:
            notes.append("no batch reached: " + ", ".join(self.not_run))
        if self.unclear:
            notes.append(
                "no figures, for their weights are neither the reference's nor those by factors that could be found: "
                + ", ".join(self.unclear)
            )
        return notes + self.notes


def _rank(sqnr_db: float) -> float:
    return -math.inf if math.isnan(sqnr_db) else sqnr_db


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan  # matplotlib leaves NaN out


def _text_row(name: str, width: int, figures: LayerComparison | OutputFigures, local: str) -> str:
    start = f"{name:<{width}}  {figures.sqnr_db:8.2f}  {local}"
    return f"{start}  {figures.cosine:8.6f}  {figures.max_abs_error:11.3g}"


def _html_row(name: str, figures: LayerComparison | OutputFigures, local: str, cell: str) -> str:
    numbers = (f"{figures.cosine:.6f}", f"{figures.max_abs_error:.3g}")
    cells = (html.escape(name), _bar(figures.sqnr_db), local, *numbers)
    return "<tr>" + "".join(f"<td {cell}>{text}</td>" for text in cells) + "</tr>"


def _bar(sqnr_db: float) -> str:
    share = 0.0 if math.isnan(sqnr_db) else min(max(sqnr_db / FULL_BAR_DB, 0.0), 1.0)
    box = "display:inline-block;width:90px;height:0.7em;background:rgba(128,128,128,.18);"
    fill = f"display:block;width:{100 * share:.0f}%;height:100%;background:rgba(31,119,180,.75);"
    return f"<span style='{box}'><span style='{fill}'></span></span> {sqnr_db:.1f}"
