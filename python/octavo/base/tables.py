# SPDX-License-Identifier: Apache-2.0
"""Tables of cells as text and HTML; results that consist of tables, as Markdown too, and written into documents."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Table:
    """A table of texts. Each row begins with a name.

    words   titles of columns of words; all others but the first are numbers, whose ends align
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    words: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        title: str,
        columns: dict[str, Callable[[Any], str]],
        rows: Iterable[Any],
        words: tuple[str, ...] = (),
    ) -> Table:
        """One line for each of `rows`, which have a `name`; `columns` is {title: function from a row to a text}."""
        cells = [[row.name, *(cell(row) for cell in columns.values())] for row in rows]
        return cls(title, ["scheme", *(name.strip() for name in columns)], cells, words)

    @property
    def numbers(self) -> list[str]:
        """Titles of the columns of numbers."""
        return [title for title in self.header[1:] if title not in self.words]

    def __str__(self) -> str:
        return f"{self.title}\n{as_text(self.header, self.rows, right=self.numbers)}"

    def to_markdown(self) -> str:
        marks = ["---:" if title in self.numbers else "---" for title in self.header]
        lines = [self.header, marks, *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(cells)} |" for cells in lines)])

    def _repr_html_(self) -> str:
        caption = f"<caption style='text-align:left;padding-top:8px;'>{html.escape(self.title)}</caption>"
        sides = ["right" if title in self.numbers else "left" for title in self.header]
        styles = [f" style='text-align:{side};padding:2px 10px;white-space:nowrap;'" for side in sides]
        return as_html(self.header, self.rows, caption, styles)


class Tables(ABC):
    """A result that is shown as tables, with a line below them."""

    MARKS: ClassVar[tuple[str, str]]  # these lines stand around the tables in a document

    @abstractmethod
    def tables(self) -> list[Table]:
        """The figures as text."""

    @property
    @abstractmethod
    def footer(self) -> str:
        """A line about the machine, and about how the figures were measured."""

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


def megabytes(count: int) -> str:
    """`count` bytes as text, in units of 10^6 (or 10^3) bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def percent(value: float) -> str:
    return f"{value:.2%}"


def as_text(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """The rows as columns of text under `header` and a line.

    right   titles of the columns that hold numbers: they are aligned at their right ends
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for cells in lines:
        columns = zip(header, cells, widths, strict=True)
        padded = (
            cell.rjust(width) if title in right else cell.ljust(width) for title, cell, width in columns
        )
        texts.append("  ".join(padded).rstrip())
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def as_html(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    styles: Sequence[str] = (),
) -> str:
    """The same rows as a table of HTML.

    caption   an HTML element
    styles    for each column, the attribute of its cells
    """

    def line(cells: Sequence[str], tag: str) -> str:
        styled = zip(cells, styles or [""] * len(cells), strict=True)
        return (
            "<tr>" + "".join(f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell, style in styled) + "</tr>"
        )

    body = "".join(line(cells, "td") for cells in rows)
    return f"<table>{caption}<thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"
