# SPDX-License-Identifier: Apache-2.0
"""What an adapter was put on, and what was left alone: one row for each linear layer."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from ..base.tables import as_html, as_text, megabytes


@dataclass(frozen=True)
class AdaptedRow:
    """One linear layer.

    name         where it sits in the model
    kind         its class
    action       "adapted" or "kept"
    detail       what it got, or why it was kept
    parameters   how many numbers are trained there
    base_bytes   memory of the layer itself, which stays as it is
    """

    name: str
    kind: str
    action: str
    detail: str
    parameters: int
    base_bytes: int


@dataclass(frozen=True)
class AdapterReport:
    """All linear layers, in the model's order. `print(report)` shows a table.

    adapter   the adapter as Python writes it
    name      what it is called in the model
    """

    adapter: str
    name: str
    rows: list[AdaptedRow] = field(default_factory=list)

    @property
    def adapted(self) -> list[AdaptedRow]:
        return [row for row in self.rows if row.action == "adapted"]

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(row.parameters for row in self.rows)

    @property
    def base_bytes(self) -> int:
        return sum(row.base_bytes for row in self.rows)

    def __str__(self) -> str:
        return f"{as_text(HEADER, self._cells(), right=HEADER[4:])}\n{self._summary()}"

    def __repr__(self) -> str:
        return f"AdapterReport({self._summary()})"

    def _repr_html_(self) -> str:
        return f"{as_html(HEADER, self._cells())}<p>{html.escape(self._summary())}</p>"

    def _cells(self) -> list[list[str]]:
        return [
            [row.name, row.kind, row.action, row.detail, f"{row.parameters:,}", megabytes(row.base_bytes)]
            for row in self.rows
        ]

    def _summary(self) -> str:
        return (
            f"{self.name!r}, {self.adapter}: {len(self.adapted)} of {len(self.rows)} linear layers adapted; "
            f"{self.parameters:,} numbers are trained ({megabytes(4 * self.parameters)}), beside "
            f"{megabytes(self.base_bytes)} of frozen layers"
        )


HEADER = ("name", "kind", "action", "detail", "trained", "base")
