# SPDX-License-Identifier: Apache-2.0
"""Tables that fit the terminal: if it is too narrow, columns are left out first, and then cells are folded."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Prints `rows` under `header`. Columns in `right` are aligned right; columns in `spare` may be left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)]
    narrow = sum(widths) > console.width
    kept = [number for number, title in enumerate(header) if not (narrow and title in spare)]
    table = Table(box=box.SIMPLE_HEAD)
    for number in kept:
        table.add_column(
            header[number], justify="right" if header[number] in right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(row[number]) for number in kept))  # Text: a name like [bold] is no markup
    console.print(table)
