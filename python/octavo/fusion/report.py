# SPDX-License-Identifier: Apache-2.0
"""What fuse_ did at each place, or why it did nothing there, and how far the model's output moved."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any

from ..base.tables import as_html, as_text
from ..evaluation.comparison_result import OutputFigures


@dataclass(frozen=True)
class FusionRow:
    """What was done at one place of the model.

    step     "attention", "gated", "activations", "norms", ...
    name     where it sits in the model, "" for the model itself
    kind     class of what was there
    action   "fused" or "kept"
    reason   why it was kept
    error    largest |difference| between the replacement and the original, both given the same tensors of the
             example; None: they were not compared
    """

    step: str
    name: str
    kind: str
    action: str
    reason: str
    error: float | None


@dataclass(frozen=True)
class FusionReport:
    """Rows in the order of the steps, then of the model. `print(report)` shows a table.

    outputs   step -> the model's output on the example after that step, against the output before all of them
    """

    rows: list[FusionRow] = field(default_factory=list)
    outputs: dict[str, OutputFigures] = field(default_factory=dict)

    @property
    def fused(self) -> list[FusionRow]:
        return [row for row in self.rows if row.action == "fused"]

    @property
    def kept(self) -> list[FusionRow]:
        return [row for row in self.rows if row.action == "kept"]

    @property
    def output(self) -> OutputFigures | None:
        """The model's output after all steps against the one before; None if nothing was fused."""
        return list(self.outputs.values())[-1] if self.outputs else None

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [...], "outputs": {step: figures}}. Equal outputs have SQNR inf, which strict JSON cannot hold."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "outputs": {step: asdict(figures) for step, figures in self.outputs.items()},
        }

    def __repr__(self) -> str:
        return f"FusionReport({self._summary()})"

    def __str__(self) -> str:
        return "\n".join([as_text(_HEADER, map(_cells, self.rows)), *self._figures(), self._summary()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in [*self._figures(), self._summary()])
        return as_html(_HEADER, map(_cells, self.rows)) + notes

    def _figures(self) -> list[str]:
        return [
            f"output after {step}: cosine {figures.cosine:.6f}, max |error| {figures.max_abs_error:.1e}"
            for step, figures in self.outputs.items()
        ]

    def _summary(self) -> str:
        return f"{len(self.fused)} of {len(self.rows)} places fused"


_HEADER = ("step", "name", "kind", "action", "max |error|", "reason")


def _cells(row: FusionRow) -> tuple[str, ...]:
    error = "-" if row.error is None else f"{row.error:.1e}"
    return row.step, row.name or "(the model)", row.kind, row.action, error, row.reason
