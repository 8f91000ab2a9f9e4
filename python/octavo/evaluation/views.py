# SPDX-License-Identifier: Apache-2.0
"""An evaluation as text, Markdown and HTML: one table, one row for each figure that was measured."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from .figures import SECTIONS, Figure

TITLES = ("", "reference", "model")
COLOUR = "rgba(31,119,180,.75)"
BARS = {  # shown when the mouse rests on a bar
    "share": "0 to 100 %",
    "log": "1e-6 to 1, logarithmic",
    "decibel": "0 to 60 dB",
    "ratio": "the mark is the reference",
}


@dataclass(frozen=True)
class FigureRow:
    """One line: a figure's label, its values as text, the length of its bar (0 to 1, or None) and what it measures."""

    label: str
    reference: str
    model: str
    bar: float | None
    bar_kind: str


def sections(evaluation: Any) -> dict[str, list[FigureRow]]:
    """The rows of every section that has one, in order."""
    found = {}
    for title, figures in SECTIONS.items():
        rows = [_row(figure, evaluation) for figure in figures if figure.value(evaluation) is not None]
        if rows:
            found[title] = rows
    return found


def headline(evaluation: Any) -> str:
    """What was evaluated, in one line."""
    schemes = [f"{count} x {name}" for name, count in evaluation.schemes.items()]
    kind = evaluation.kind.replace("_", " ")
    batches = f"{evaluation.batches} batch{'es' * (evaluation.batches != 1)}"
    tokens = f", {evaluation.distribution.tokens:,} positions" if evaluation.distribution else ""
    return f"{kind}: {', '.join(schemes) or 'no quantized layers'}; {batches}{tokens}"


def evaluation_text(evaluation: Any) -> str:
    """The evaluation as a table of text."""
    lines = [headline(evaluation)]
    table = sections(evaluation)
    rows = [row for group in table.values() for row in group]
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("label", "reference", "model")]
    widths = [max(width, len(title)) for width, title in zip(widths, TITLES, strict=True)]
    for title, group in table.items():
        lines += ["", f"{title:<{widths[0] + 2}}  {TITLES[1]:>{widths[1]}}  {TITLES[2]:>{widths[2]}}"]
        for row in group:
            lines.append(
                f"  {row.label:<{widths[0]}}  {row.reference:>{widths[1]}}  {row.model:>{widths[2]}}"
            )
    return "\n".join(lines + [""] * bool(evaluation.notes) + evaluation.notes)


def evaluation_markdown(evaluation: Any) -> str:
    """The evaluation as a heading and a table of Markdown."""
    lines = [
        f"**Octavo evaluation**: {headline(evaluation)}",
        "",
        "| | reference | model |",
        "|---|---:|---:|",
    ]
    for title, group in sections(evaluation).items():
        lines.append(f"| **{title}** | | |")
        lines += [f"| {row.label} | {row.reference} | {row.model} |" for row in group]
    return "\n".join(lines + [""] + [f"- {note}" for note in evaluation.notes]).rstrip() + "\n"


def evaluation_html(evaluation: Any) -> str:
    """The evaluation as a table of HTML, with bars, in the notebook's colours, light or dark."""
    cell = "style='text-align:{};padding:1px 12px 1px {}px;white-space:nowrap;border:0'"
    parts = [f"<div style='margin:4px 0'><b>{html.escape(headline(evaluation))}</b></div>", "<table>"]
    for title, group in sections(evaluation).items():
        line = "border-bottom:1px solid rgba(128,128,128,.5)"
        heads = [f"<th style='text-align:left;padding:8px 12px 1px 0;{line}'>{html.escape(title)}</th>"]
        for text in (TITLES[1] if any(row.reference for row in group) else "", TITLES[2], ""):
            heads.append(
                f"<th style='text-align:right;padding:8px 12px 1px 0;font-weight:normal;{line}'>{text}</th>"
            )
        parts.append("<tr style='background:none'>" + "".join(heads) + "</tr>")
        for row in group:
            texts = [(row.label, cell.format("left", 10)), (row.reference, cell.format("right", 0))]
            texts += [(row.model, cell.format("right", 0))]
            cells = [f"<td {style}>{html.escape(text)}</td>" for text, style in texts]
            cells.append(f"<td {cell.format('left', 0)}>{_bar(row)}</td>")
            parts.append("<tr style='background:none'>" + "".join(cells) + "</tr>")
    parts.append("</table>")
    notes = "".join(f"<div style='opacity:.75'>{html.escape(note)}</div>" for note in evaluation.notes)
    return "".join(parts) + notes


def _row(figure: Figure, evaluation: Any) -> FigureRow:
    value, reference = figure.value(evaluation), figure.reference_value(evaluation)
    return FigureRow(
        figure.label,
        "" if reference is None else figure.shown(reference),
        "" if value is None else figure.shown(value) + _error(figure, evaluation),
        figure.bar_share(evaluation),
        figure.bar,
    )


def _error(figure: Figure, evaluation: Any) -> str:
    """The figure's standard error as text; "" if it has none."""
    if figure.name not in ("kld", "ln_perplexity_ratio"):
        return ""
    value = getattr(evaluation.distribution, f"{figure.name}_standard_error")
    return f" ± {value:.2g}"


def _bar(row: FigureRow) -> str:
    if row.bar is None:
        return ""
    box = "display:inline-block;position:relative;width:90px;height:0.7em;background:rgba(128,128,128,.18);"
    fill = f"display:block;width:{100 * row.bar:.0f}%;height:100%;background:{COLOUR};"
    mark = "position:absolute;left:50%;top:-1px;bottom:-1px;width:1px;background:rgba(128,128,128,.9);"
    middle = f"<span style='{mark}'></span>" if row.bar_kind == "ratio" else ""
    return f"<span style='{box}' title='{BARS[row.bar_kind]}'><span style='{fill}'></span>{middle}</span>"
