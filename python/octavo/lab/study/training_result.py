# SPDX-License-Identifier: Apache-2.0
"""What `octavo study --train` found: attributes, JSON, text, Markdown and HTML tables.

Only numbers live here; how they are measured is training_study.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...base.tables import Table, percent
from .saved_result import SavedResult

NONE, FLOAT, STRAIGHT_THROUGH, LEARNED_SCALES = "none", "in float", "straight through", "learned scales"


@dataclass(frozen=True)
class TrainingRow:
    """The figures of one scheme after one way of training. KL divergences are nats per byte; shares lie in 0 .. 1.

    scheme        what `Scheme.to_dict` says; empty for the float model
    training      NONE; FLOAT, before quantizing; through the rounding: STRAIGHT_THROUGH or LEARNED_SCALES
    learning_rate, training_loss   of the largest step; the mean of the last steps, nats per byte; 0 without training
    perplexity, accuracy   on the held-out bytes; excess: how much higher the perplexity is than that of the float model
                  with as many steps of training (0.01 is 1%)
    kld, kld_standard_error, top1_agreement   against the float model as it was before all training
    cpu_seconds   of the training
    """

    name: str
    scheme: dict[str, Any]
    training: str
    learning_rate: float
    training_loss: float
    perplexity: float
    excess: float
    kld: float
    kld_standard_error: float
    top1_agreement: float
    accuracy: float
    cpu_seconds: float


@dataclass(frozen=True)
class TrainingResult(SavedResult):
    """What `training_study.run` returns: rows of the float model, then of each scheme.

    settings   how much was trained and measured
    machine    the CPU, versions and threads
    """

    MARKS = ("<!-- octavo study --train -->", "<!-- end of octavo study --train -->")
    ROW, STEM = TrainingRow, "study-training"

    rows: list[TrainingRow]

    def tables(self) -> list[Table]:
        count, python = self.settings["windows"] * self.settings["context"], self.machine["python"]
        steps, batch = self.settings["steps"], self.settings["batch"]
        title = f"{count:,} held-out bytes of Python {python}'s library; training: {steps} steps of {batch} windows"
        return [Table.of(title, _COLUMNS, self.rows)]

    @property
    def footer(self) -> str:
        """A line about the machine, and how long it trained."""
        cpu, isa, torch = (self.machine[name] for name in ("cpu", "active_isa", "torch"))
        taken = {
            training: sum(row.cpu_seconds for row in rows) / len(rows) for training, rows in self._trained()
        }
        times = ", ".join(f"{training} {seconds:.0f}" for training, seconds in taken.items())
        return f"{cpu}, {isa} kernels, torch {torch}; CPU seconds of one training: {times}"

    def _trained(self) -> list[tuple[str, list[TrainingRow]]]:
        """The rows of each way of training, each training once: what was trained in float serves all schemes."""
        rows = [row for row in self.rows if row.cpu_seconds > 0]
        return [
            (training, [row for row in rows if row.training == training])
            for training in dict.fromkeys(row.training for row in rows)
        ]


# Columns of the table: title and cell.
_COLUMNS: dict[str, Callable[[TrainingRow], str]] = {
    "training": lambda row: row.training,
    "learning rate": lambda row: f"{row.learning_rate:g}" if row.learning_rate else "",
    "perplexity": lambda row: f"{row.perplexity:.4f}",
    "above trained fp32": lambda row: percent(row.excess),
    "KLD": lambda row: f"{row.kld:.5f} ± {row.kld_standard_error:.5f}",
    "top-1 agreement": lambda row: percent(row.top1_agreement),
    "accuracy": lambda row: percent(row.accuracy),
}
