# SPDX-License-Identifier: Apache-2.0
"""Results that are tables: as text, Markdown and HTML, all made of the same cells, and in their place in a document."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Table:
    """Cells as text, a name first in each row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, title: str, columns: dict[str, Callable[[Any], str]], rows: Iterable[Any]) -> Table:
        """A line for each of `rows`, which have a `name`; `columns` gives each cell its title and its text."""
        cells = [[row.name, *(cell(row) for cell in columns.values())] for row in rows]
        return cls(title, ["scheme", *(name.strip() for name in columns)], cells)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [_text_line(cells, widths) for cells in (self.header, *self.rows)]
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(cells)} |" for cells in lines)])

    def _repr_html_(self) -> str:
        head, body = _html_line(self.header, "th"), "".join(_html_line(cells, "td") for cells in self.rows)
        caption = f"<caption style='text-align:left;padding-top:8px;'>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


class Tables(ABC):
    """A result that is shown as tables, with a line below them."""

    MARKS: ClassVar[tuple[str, str]]  # around the tables in a document

    @abstractmethod
    def tables(self) -> list[Table]:
        """The figures as text."""

    @property
    @abstractmethod
    def footer(self) -> str:
        """On what machine, and how."""

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.tables()), self.footer])

    def to_markdown(self) -> str:
        """The tables for a document or a pull request."""
        return "\n\n".join([*map(Table.to_markdown, self.tables()), self.footer]) + "\n"

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self.tables())
        return f"{tables}<div>{html.escape(self.footer)}</div>"

    def write_into(self, path: str | Path) -> None:
        """Replaces what stands between MARKS in a Markdown file by the tables. Raises: ValueError without the marks."""
        text = Path(path).read_text(encoding="utf-8")
        start, end = (text.find(mark) for mark in self.MARKS)
        if not 0 <= start < end:
            raise ValueError(
                f"{path} has no lines {self.MARKS[0]} and {self.MARKS[1]}; put them where the tables belong"
            )
        start += len(self.MARKS[0])
        Path(path).write_text(f"{text[:start]}\n{self.to_markdown()}{text[end:]}", encoding="utf-8")


def percent(value: float) -> str:
    return f"{value:.2%}"


def _text_line(cells: list[str], widths: list[int]) -> str:
    name, *figures = (
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *figures])


def _html_line(cells: list[str], tag: str) -> str:
    styles = ("text-align:left", *["text-align:right"] * (len(cells) - 1))
    inner = "".join(
        f"<{tag} style='{style};padding:2px 10px;white-space:nowrap;'>{html.escape(cell)}</{tag}>"
        for style, cell in zip(styles, cells, strict=True)
    )
    return f"<tr>{inner}</tr>"
