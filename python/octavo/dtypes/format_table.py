# SPDX-License-Identifier: Apache-2.0
"""The formats side by side: range, precision, and what a model of 7 billion weights weighs in each of them."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from .formats import FORMATS, NumberFormat

PARAMETERS = 7_000_000_000
COLUMNS = (
    "format",
    "bits",
    "sign+exp+fraction",
    "range",
    "least normal",
    "least > 0",
    "step at 1",
    "digits",
    "integers to",
    "Inf, NaN",
    "7B, GB",
)


@dataclass(frozen=True)
class FormatTable:
    """What `table` returns: print it, or show it in a notebook."""

    formats: tuple[NumberFormat, ...]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts for each format, in the order of COLUMNS."""
        return [_cells(format) for format in self.formats]

    def to_dict(self) -> list[dict[str, Any]]:
        """One plain dict for each format; JSON."""
        return [_figures(format) for format in self.formats]

    def __str__(self) -> str:
        lines = [COLUMNS, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        return "\n".join(
            [texts[0].rstrip(), "-" * sum(widths, 2 * len(widths) - 2), *map(str.rstrip, texts[1:])]
        )

    def _repr_html_(self) -> str:
        cell = "style='text-align:left;padding:2px 5px;font-size:12px;white-space:nowrap;'"
        head = "".join(f"<th {cell}>{html.escape(title)}</th>" for title in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td {cell}>{html.escape(text)}</td>" for text in row) + "</tr>"
            for row in self.rows
        )
        return f"<div style='overflow-x:auto;'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def table() -> FormatTable:
    """Compares all formats of FORMATS.

    "integers to": all integers from 0 to this one are exact; "7B, GB": memory of 7 billion weights, 10^9 bytes to a GB.
    Source: ours; the figures follow from each format's bits (`NumberFormat`).
    """
    return FormatTable(tuple(FORMATS.values()))


def _figures(format: NumberFormat) -> dict[str, Any]:
    names = (
        "name bits sign_bits exponent_bits fraction_bits bias min max smallest_normal smallest_subnormal epsilon "
        "decimal_digits exact_integers has_inf has_nan"
    )
    figures = {name: getattr(format, name) for name in names.split()}
    return {**figures, "gigabytes_7b": PARAMETERS * format.bits / 8 / 1e9}


def _cells(format: NumberFormat) -> tuple[str, ...]:
    specials = {(True, True): "Inf, NaN", (False, True): "NaN", (False, False): "-"}
    parts = (format.sign_bits, format.exponent_bits, format.fraction_bits)
    if format.is_integer:
        parts = (format.sign_bits, 0, format.bits - format.sign_bits)
    symmetric = format.min == -format.max
    return (
        format.name,
        str(format.bits),
        "+".join(map(str, parts)),
        f"±{_short(format.max)}" if symmetric else f"{_short(format.min)} .. {_short(format.max)}",
        _short(format.smallest_normal),
        _short(format.smallest_subnormal),
        _short(format.epsilon),
        f"{format.decimal_digits:.1f}",
        _short(format.exact_integers),
        specials[format.has_inf, format.has_nan],
        f"{PARAMETERS * format.bits / 8e9:.3g}",
    )


def _short(value: float | int) -> str:
    """`value` as text: whole numbers below 10^8 with all digits, others with 5 significant digits."""
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e8 else f"{value:.5g}"
