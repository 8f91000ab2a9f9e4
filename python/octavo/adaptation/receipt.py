# SPDX-License-Identifier: Apache-2.0
"""What became of an adapter that was merged into rounded weights: how much of it survived, layer by layer."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..base.tables import as_html, as_text

HEADER = ("name", "scheme", "how", "|D| / |W|", "survived")


@dataclass(frozen=True)
class MergedRow:
    """One layer, whose weight W became Q(W + D). docs/numerics.md, eq. 129.

    name       where it sits in the model
    scheme     that of the layer; "float" for a layer that was not quantized
    how        "requantized", "exact" where only scales and the bias changed, or "float"
    change     |D|^2, and `size` |W|^2, sums over all weights
    kept       <Q(W + D) - W, D>
    """

    name: str
    scheme: str
    how: str
    change: float
    size: float
    kept: float

    @property
    def survival(self) -> float:
        """The share of the change that is in the new weights: 1 is all of it, 0 none; NaN without a change."""
        return self.kept / self.change if self.change else math.nan


@dataclass(frozen=True)
class MergeReceipt:
    """All layers that were merged. `print(receipt)` shows a table.

    kld_before   mean KL divergence from the model with the adapter beside its layers to the model without the adapter,
                 in nats: what there was to lose; None without data
    kld_after    the same from there to the merged model: what was lost
    """

    rows: list[MergedRow] = field(default_factory=list)
    kld_before: float | None = None
    kld_after: float | None = None

    @property
    def survival(self) -> float:
        """That of all layers together, each with the weight of its change; 1 if nothing was to be changed."""
        change = sum(row.change for row in self.rows)
        return sum(row.kept for row in self.rows) / change if change else 1.0

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [...], "survival": float, "kld_before": ..., "kld_after": ...}, JSON."""
        rows = [asdict(row) for row in self.rows]
        return {
            "rows": rows,
            "survival": self.survival,
            "kld_before": self.kld_before,
            "kld_after": self.kld_after,
        }

    def __str__(self) -> str:
        return f"{as_text(HEADER, self._cells(), right=HEADER[3:])}\n{self._summary()}"

    def __repr__(self) -> str:
        return f"MergeReceipt({self._summary()})"

    def _repr_html_(self) -> str:
        return f"{as_html(HEADER, self._cells())}<p>{html.escape(self._summary())}</p>"

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.name,
                row.scheme,
                row.how,
                f"{math.sqrt(row.change / row.size or 0):.4f}" if row.size else "-",
                "-" if math.isnan(row.survival) else f"{row.survival:.1%}",
            ]
            for row in self.rows
        ]

    def _summary(self) -> str:
        text = f"{self.survival:.1%} of the adapter survived the rounding"
        if self.kld_before is None or self.kld_after is None:
            return text
        return (
            f"{text}; KL divergence to the model with the adapter beside it: {self.kld_before:.3g} without the "
            f"adapter, {self.kld_after:.3g} merged"
        )
