# SPDX-License-Identifier: Apache-2.0
"""The picture behind `QuantizedTensor.plot`: a matrix, its codes, what comes back, and the error, number by number.

Only tensors come in here; what they are called and how they share scales is qparams.py's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..base.plots import require_pyplot

CELL_WIDTH, CELL_HEIGHT = 0.6, 0.34  # inches: room for "-0.0123" in 8 points


@dataclass(frozen=True)
class Matrices:
    """What is drawn, all [rows, columns]: `steps` are codes in units of their scales, which colours show; `scale` and
    `zero_point` hold each element's own."""

    x: torch.Tensor
    codes: torch.Tensor
    steps: torch.Tensor
    dequantized: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def corner(self, rows: int, columns: int) -> Matrices:
        """The top left `rows` x `columns` of each."""
        return Matrices(*(getattr(self, name)[:rows, :columns] for name in self.__dataclass_fields__))


def draw(matrices: Matrices, formula: str, max_rows: int, max_columns: int) -> Any:
    """A new matplotlib Figure of four panels: x, codes, dequantized by `formula`, dequantized - x.

    Raises: ImportError if matplotlib is missing.
    """
    shown = matrices.corner(max_rows, max_columns)
    rows, columns = shown.x.shape
    x, back = shown.x.double(), shown.dequantized.double()
    error, steps = back - x, shown.steps
    figure, axes = _panels(rows, columns)
    _panel(axes[0], "x", x, x, _short, _limit(x), "RdBu_r")
    _panel(axes[1], "codes", shown.codes, steps, str, _limit(steps), "PuOr_r")
    _panel(axes[2], f"dequantized = {formula}", back, back, _short, _limit(x), "RdBu_r")
    title = f"error = dequantized - x, at most {_short(_limit(error))}"
    _panel(axes[3], title, error, error, _signed, _limit(error), "PiYG")
    note = _write_scales(axes[1], shown)
    if shown.x.shape != matrices.x.shape:
        note = f"top left corner of {list(matrices.x.shape)}; {note}"
    figure.suptitle(note, fontsize=9, x=0.005, ha="left")
    return figure


def _panels(rows: int, columns: int) -> tuple[Any, list[Any]]:
    width = max(CELL_WIDTH * columns, 2.2) + 1.1  # beside the cells: the rows' scales
    size = (2 * width, 2 * (CELL_HEIGHT * rows + 0.75))
    pyplot = require_pyplot("QuantizedTensor.plot")
    figure, axes = pyplot.subplots(2, 2, figsize=size, layout="constrained")
    return figure, list(axes.flat)


def _panel(
    ax: Any,
    title: str,
    numbers: torch.Tensor,
    colours: torch.Tensor,
    text: Callable[[Any], str],
    limit: float,
    colour_map: str,
) -> None:
    """One matrix: `numbers` are written, `colours` in -limit .. limit are seen."""
    ax.imshow(colours.double().numpy(), cmap=colour_map, vmin=-limit, vmax=limit, alpha=0.75, aspect="auto")
    for row, values in enumerate(numbers.tolist()):
        for column, value in enumerate(values):
            strong = abs(float(colours[row, column])) > 0.7 * limit
            colour = "white" if strong else "black"
            ax.text(column, row, text(value), ha="center", va="center", fontsize=8, color=colour)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xticks([])
    ax.set_yticks([])
    for edge in range(1, numbers.shape[0]):
        ax.axhline(edge - 0.5, color="white", linewidth=1)
    for edge in range(1, numbers.shape[1]):
        ax.axvline(edge - 0.5, color="white", linewidth=1)


def _write_scales(ax: Any, shown: Matrices) -> str:
    """Writes the scales beside the rows or below the columns of the codes; returns where, or the one scale of all."""
    scale, zero_point = shown.scale, shown.zero_point
    rows = [_runs(*pair) for pair in zip(scale.tolist(), zero_point.tolist(), strict=True)]
    columns = [_runs(*pair) for pair in zip(scale.T.tolist(), zero_point.T.tolist(), strict=True)]
    what = "scale (zero_point)" if zero_point.any() else "scale"
    if all(row == rows[0] and len(row) == 1 for row in rows):
        return f"{what} of all: {rows[0][0]}"
    ax.tick_params(length=0, labelsize=7)
    if all(len(column) == 1 for column in columns):
        ax.set_xticks(range(len(columns)), [column[0] for column in columns], rotation=30)
        return f"below the codes: {what}"
    ax.yaxis.tick_right()
    ax.set_yticks(range(len(rows)), [" | ".join(row) for row in rows])
    for edge in (scale[:, 1:] != scale[:, :-1]).any(0).nonzero().flatten().tolist():
        ax.axvline(edge + 0.5, color="black", linewidth=1.5)  # where one group ends
    return f"beside the codes: {what}"


def _runs(scales: list[float], zero_points: list[int]) -> list[str]:
    """The scales along one row, neighbours that are equal written once."""
    texts: list[str] = []
    for scale, zero_point in zip(scales, zero_points, strict=True):
        text = f"{scale:.3g}" + (f" ({zero_point})" if zero_point else "")
        if not texts or texts[-1] != text:
            texts.append(text)
    return texts


def _limit(values: torch.Tensor) -> float:
    finite = values.double().abs()[values.double().isfinite()]
    return float(finite.max()) if finite.numel() and finite.max() > 0 else 1.0


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _signed(value: float) -> str:
    return f"{value:+.2g}" if value else "0"
