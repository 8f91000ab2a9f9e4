# SPDX-License-Identifier: Apache-2.0
"""What moved between two result files: python benchmarks/compare.py old.json new.json [--all]

A row has moved if the ranges that 8 of 10 rounds stayed within do not overlap. Rivals are the control: their code did
not change, so what they moved by is the machine's doing. Exit code 1 if one of ours became slower beyond its spread.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tables import OURS, figure, table

Row = dict[str, Any]
# Set by the run or the rival's declaration, not by what was measured.
NOT_NAMES = ("failure", "as_accurate")
MARGIN = 0.02  # two runs of the same code differ by this much even where each run's own spread is narrower


@dataclass(frozen=True)
class Change:
    """One row of both files. ratio: new median over old; below 1 is faster."""

    key: tuple[tuple[str, Any], ...]
    old_ms: float
    new_ms: float
    spread: float  # the wider of both ranges, relative to its median
    verdict: str  # "faster", "slower" or "" for within the spread

    @property
    def ratio(self) -> float:
        return self.new_ms / self.old_ms

    @property
    def is_ours(self) -> bool:
        return any(str(value).startswith(OURS) for _, value in self.key)


def key_of(benchmark: str, row: Row) -> tuple[tuple[str, Any], ...]:
    """What names a row: everything that is not a measured figure."""
    names = [(name, value) for name, value in row.items() if name not in NOT_NAMES]
    return (
        ("benchmark", benchmark),
        *((name, value) for name, value in names if isinstance(value, str | int)),
    )


def rows_of(results: dict[str, Any]) -> dict[tuple[tuple[str, Any], ...], Row]:
    """Every timed row of every benchmark, by its name."""
    return {
        key_of(benchmark, row): row
        for benchmark, rows in results.items()
        if isinstance(rows, list)
        for row in rows
        if isinstance(row, dict) and "median_ms" in row
    }


def verdict(old: Row, new: Row) -> str:
    """faster or slower only if the ranges p10 .. p90 are apart, and the medians by more than MARGIN."""
    if abs(new["median_ms"] / old["median_ms"] - 1) <= MARGIN:
        return ""
    if new["p90_ms"] < old["p10_ms"]:
        return "faster"
    return "slower" if new["p10_ms"] > old["p90_ms"] else ""


def spread(row: Row) -> float:
    return (row["p90_ms"] - row["p10_ms"]) / row["median_ms"]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Of the rows that both files have, in the old file's order."""
    before, after = rows_of(old), rows_of(new)
    return [
        Change(
            key,
            row["median_ms"],
            after[key]["median_ms"],
            max(spread(row), spread(after[key])),
            verdict(row, after[key]),
        )
        for key, row in before.items()
        if key in after
    ]


def report(old: dict[str, Any], new: dict[str, Any], everything: bool = False) -> str:
    found = changes(old, new)
    lines = [
        f"{name}: {old['machine'].get(name)} -> {new['machine'].get(name)}"
        for name in ("cpu", "threads", "active_isa", "malloc", "caps", "torch", "commit")
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    cells = [
        [
            " ".join(str(value) for _, value in change.key if value != ""),
            figure(change.old_ms),
            figure(change.new_ms),
            f"{change.ratio:.2f}",
            f"{change.spread:.0%}",
            change.verdict,
        ]
        for change in sorted(found, key=lambda change: change.ratio)
        if everything or change.verdict
    ]
    if cells:
        lines += ["", table(["what", "old ms", "new ms", "new / old", "spread", "verdict"], cells), ""]
    ratios = {
        "octavo": [change.ratio for change in found if change.is_ours],
        "rivals, the control": [change.ratio for change in found if not change.is_ours],
    }
    lines += [
        f"{name}: new / old {median(part):.3f} in {len(part)} rows" for name, part in ratios.items() if part
    ]
    moved = [change for change in found if change.verdict]
    lines.append(f"{len(moved)} of {len(found)} rows moved beyond their spread")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="also rows that did not move")
    chosen = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (chosen.old, chosen.new))
    if old["schema"] != new["schema"]:
        parser.error(f"schema {old['schema']} and schema {new['schema']} cannot be compared")
    print(report(old, new, chosen.all))
    return int(any(change.is_ours and change.verdict == "slower" for change in changes(old, new)))


if __name__ == "__main__":
    sys.exit(main())
