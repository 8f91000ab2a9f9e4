# SPDX-License-Identifier: Apache-2.0
"""What `octavo study` found, and its faces: attributes, JSON, text, Markdown and HTML tables, a plot.

Only numbers live here; how they are measured is study.py. All tables are made of the same cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.plots import new_axes, require_pyplot
from ...base.tables import Table, percent
from .saved_result import SavedResult


@dataclass(frozen=True)
class StudyRow:
    """One scheme's figures. KL divergences are nats per byte over the whole vocabulary; shares lie in 0 .. 1.

    scheme                 what `Scheme.to_dict` says; empty for the float model
    perplexity, accuracy   on the held-out bytes; flips: share of bytes that went from right to wrong or back
    kld, kld_standard_error, top1_agreement   against the float model, on the same bytes
    first_difference       bytes of a greedy completion before the first that the float model would not have written
    identical              share of completions without a difference
    prefill_, generation_  forced along the float model's completions: in the prompts, and in what follows them
    bits_per_weight        of the quantized layers, scales included; bytes_on_disk: of the whole model
    milliseconds, speedup  median of one forward, by "windows x bytes"; speedup: over the float model, in turn
    """

    name: str
    scheme: dict[str, Any]
    perplexity: float
    kld: float
    kld_standard_error: float
    top1_agreement: float
    accuracy: float
    flips: float
    first_difference: float
    identical: float
    prefill_kld: float
    prefill_rejection_rate: float
    generation_kld: float
    generation_rejection_rate: float
    bits_per_weight: float
    bytes_on_disk: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyResult(SavedResult):
    """What `study.run` returns: a row for the float model, then one for each scheme.

    settings   how much was measured: windows, prompts, bytes
    machine    the CPU, versions and threads; they explain the times, and the Python whose sources are the text
    """

    MARKS = ("<!-- octavo study -->", "<!-- end of octavo study -->")
    ROW, STEM = StudyRow, "study"

    rows: list[StudyRow]

    @property
    def schemes(self) -> list[StudyRow]:
        """The rows without the float model's."""
        return [row for row in self.rows if row.scheme]

    def pareto_front(self) -> list[StudyRow]:
        """The schemes that no other one beats in bits per weight and KLD at once, the smallest first."""
        front: list[StudyRow] = []
        for row in sorted(self.schemes, key=lambda row: (row.bits_per_weight, row.kld)):
            if not front or row.kld < front[-1].kld:
                front.append(row)
        return front

    def tables(self) -> list[Table]:
        """The figures as text: quality, completions, size and speed."""
        shapes = list(self.rows[0].milliseconds) if self.rows else []
        speed = {f"speed {shape}": _speedup(shape) for shape in shapes}
        return [
            Table.of(self._text(), _QUALITY, self.rows),
            Table.of(self._completions(), _COMPLETIONS, self.rows),
            Table.of("Size, and speed as a multiple of fp32's", _SIZE | speed, self.rows),
        ]

    @property
    def footer(self) -> str:
        """A line about the machine."""
        cpu, isa, threads = (self.machine[name] for name in ("cpu", "active_isa", "threads"))
        return f"{cpu}, {isa} kernels, torch {self.machine['torch']}; timed with {threads} thread{'s' * (threads > 1)}"

    def save(self, folder: str | Path) -> list[Path]:
        """Writes study.json, study.md and, with matplotlib, study.png into `folder`; returns the paths."""
        paths = super().save(folder)
        try:
            pyplot = require_pyplot("StudyResult.save")
        except ImportError:
            return paths
        picture = Path(folder) / "study.png"
        figure = self.plot().figure
        figure.savefig(picture, dpi=120)
        pyplot.close(figure)
        return [*paths, picture]

    def plot(self, ax: Any = None) -> Any:
        """Draws KLD, with its standard error, against bits per weight on `ax` or a new figure; returns the Axes.

        The line joins the Pareto front: nothing is both smaller and closer to float. A scheme that changes nothing has
        no place on a log scale and gets no mark. Nothing is shown or saved.
        Raises: ImportError if matplotlib is missing.
        """
        ax = new_axes("StudyResult.plot", 8, 5) if ax is None else ax
        front = [row for row in self.pareto_front() if row.kld > 0]
        bits, klds = [row.bits_per_weight for row in front], [row.kld for row in front]
        ax.plot(
            bits, klds, "-o", color="tab:orange", markersize=11, markerfacecolor="none", label="Pareto front"
        )
        marked = sorted((row for row in self.schemes if row.kld > 0), key=lambda row: row.kld)
        for row, height in zip(marked, _apart([row.kld for row in marked]), strict=True):
            x = row.bits_per_weight
            ax.errorbar(
                x, row.kld, row.kld_standard_error, fmt="o", color="tab:blue", markersize=5, capsize=3
            )
            line = {"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5, "relpos": (0, 0.5)}
            ax.annotate(row.name, (x, row.kld), (x + 0.2, height), fontsize=8, va="center", arrowprops=line)
        ax.set_yscale("log")
        ax.margins(y=0.15)
        if bits:  # room for the names
            ax.set_xlim(
                min(row.bits_per_weight for row in self.schemes) - 0.5,
                max(row.bits_per_weight for row in self.schemes) + 2,
            )
        ax.grid(alpha=0.3, which="both", linewidth=0.5)
        ax.set_xlabel("bits per weight of the quantized layers, scales included")
        ax.set_ylabel("KL divergence from float, nats per byte")
        ax.set_title(f"octavo study: {self._text()}", fontsize=9, loc="left")
        ax.legend(fontsize=8, frameon=False)
        return ax

    def _text(self) -> str:
        count = self.settings["windows"] * self.settings["context"]
        return f"{count:,} held-out bytes of Python {self.machine['python']}'s library"

    def _completions(self) -> str:
        prompts, prompt, new = (self.settings[name] for name in ("prompts", "prompt_bytes", "new_bytes"))
        return f"{prompts} prompts of {prompt} bytes, {new} greedy bytes each"


def _apart(values: list[float]) -> list[float]:
    """Heights for names beside ascending `values` on a log axis, so that none covers another."""
    heights: list[float] = []
    for value in values:
        gap = (values[-1] / values[0]) ** 0.05  # a twentieth of the axis
        heights.append(max(value, heights[-1] * gap) if heights else value)
    return heights


def _speedup(shape: str) -> Callable[[StudyRow], str]:
    return lambda row: f"{row.speedup[shape]:.2f}x"


# Columns of the tables: title and cell.
_QUALITY: dict[str, Callable[[StudyRow], str]] = {
    "perplexity": lambda row: f"{row.perplexity:.4f}",
    "KLD": lambda row: f"{row.kld:.6f} ± {row.kld_standard_error:.6f}",
    "top-1 agreement": lambda row: percent(row.top1_agreement),
    "accuracy": lambda row: percent(row.accuracy),
    "flips": lambda row: percent(row.flips),
}
_COMPLETIONS: dict[str, Callable[[StudyRow], str]] = {
    "first difference": lambda row: f"{row.first_difference:.1f}",
    "identical": lambda row: percent(row.identical),
    "prefill KLD": lambda row: f"{row.prefill_kld:.6f}",
    "rejected": lambda row: percent(row.prefill_rejection_rate),
    "generation KLD": lambda row: f"{row.generation_kld:.6f}",
    # The space only makes the key another one.
    "rejected ": lambda row: percent(row.generation_rejection_rate),
}
_SIZE: dict[str, Callable[[StudyRow], str]] = {
    "bits per weight": lambda row: f"{row.bits_per_weight:.2f}",
    "MB on disk": lambda row: f"{row.bytes_on_disk / 1e6:.3f}",
}
