# SPDX-License-Identifier: Apache-2.0
"""What a conversion did to every layer of a model, or why it did nothing: one row for each module with weights."""

from __future__ import annotations

import html
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..base.tables import as_html, as_text


@dataclass(frozen=True)
class Row:
    """What was done with one module.

    name           where it sits in the model, "" for the model itself
    kind           class before the conversion
    action         "quantized", "prepared" or "kept"
    reason         why it was kept; of a quantized layer what should be known of how it was done, mostly nothing
    scheme         the scheme's name, empty if kept
    bytes_before, bytes_after   memory of its own parameters and buffers; what modules share counts once, at the first
    """

    name: str
    kind: str
    action: str
    reason: str
    scheme: str
    bytes_before: int
    bytes_after: int


def experts_joined(rows: list[Row]) -> list[Row]:
    """`rows` with one row for what was done alike with the same matrix of all experts: `mlp.experts.down_proj` stands
    for `mlp.experts.0.down_proj` and the others."""
    joined: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name, found = re.subn(r"\bexperts\.\d+\.", "experts.", row.name)
        one = (name, row.kind, row.action, row.reason, row.scheme) if found else (row.name,)
        joined.setdefault(one, []).append(row)
    return [own[0] if len(own) == 1 else _sum_of(name, own) for (name, *_), own in joined.items()]


def _sum_of(name: str, rows: list[Row]) -> Row:
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    kind = f"{len(rows)} x {rows[0].kind}"
    return replace(rows[0], name=name, kind=kind, bytes_before=before, bytes_after=after)


@dataclass(frozen=True)
class QuantizationReport:
    """All rows, in the model's order. `print(report)` shows a table."""

    rows: list[Row] = field(default_factory=list)

    @property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.action == "quantized"]

    @property
    def prepared(self) -> list[Row]:
        return [row for row in self.rows if row.action == "prepared"]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row.action == "kept"]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [...], "bytes_before": int, "bytes_after": int}, JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __repr__(self) -> str:
        return f"QuantizationReport({self._summary()})"

    def __str__(self) -> str:
        header = self._header()
        return f"{as_text(header, self._cells(), right=header[4:6])}\n{self._summary()}"

    def _repr_html_(self) -> str:
        return f"{as_html(self._header(), self._cells())}<p>{html.escape(self._summary())}</p>"

    @property
    def _unit(self) -> tuple[str, int]:
        """The unit of all sizes and its bytes: the largest unit of which the whole model has at least one."""
        return ("MB", 10**6) if max(self.bytes_before, self.bytes_after) >= 10**6 else ("kB", 10**3)

    def _header(self) -> tuple[str, ...]:
        unit, _ = self._unit
        return ("name", "kind", "action", "scheme", f"{unit} before", f"{unit} after", "reason")

    def _cells(self) -> list[tuple[str, ...]]:
        _, unit = self._unit
        return [
            (
                row.name or "(the model)",
                row.kind,
                row.action,
                row.scheme or "-",
                _amount(row.bytes_before, unit),
                _amount(row.bytes_after, unit),
                row.reason,
            )
            for row in self.rows
        ]

    def _summary(self) -> str:
        smaller = f" ({self.bytes_before / self.bytes_after:.2f}x smaller)" if self.bytes_after else ""
        name, unit = self._unit
        rows, done = (self.prepared, "prepared") if self.prepared else (self.quantized, "quantized")
        return (
            f"{len(rows)} of {len(self.rows)} layers with weights {done}, "
            f"{_amount(self.bytes_before, unit)} -> {_amount(self.bytes_after, unit)} {name}{smaller}"
            f"{self._mostly_float()}"
        )

    def _mostly_float(self) -> str:
        """What the summary adds if most bytes stay float, for then the number of layers says little; else ""."""
        kept: dict[str, int] = {}
        for row in self.kept:
            kept[row.kind] = kept.get(row.kind, 0) + row.bytes_before
        share = sum(kept.values()) / self.bytes_before if self.bytes_before else 0.0
        if share <= 2 / 3:
            return ""
        largest = max(kept, key=kept.__getitem__)
        return f"; {100 * share:.0f} % of the bytes stay as they were, most of them in {largest}"


def _amount(count: int, unit: int) -> str:
    """`count` bytes in units, with three digits after the point, or with more where these would be zeros."""
    return f"{count / unit:.{6 if 0 < count < unit / 1000 else 3}f}"
