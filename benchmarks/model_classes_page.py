# SPDX-License-Identifier: Apache-2.0
"""docs/models.md, written from the rows of model_classes.py."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tables

# Above this, relative to the largest logit, float32 models that fused and unfused ones are held against each other do
# not differ by rounding.
AGREES = 1e-4

OPENING = """
Every class of transformers that writes text, tiny and with random weights: what `quantize_` with `Int8Dynamic()` and
`fuse_` do with it, and whether the fused model still gives what it gave. `python benchmarks/model_classes.py run` makes
the rows (transformers {versions}), `python benchmarks/model_classes.py page` this page.

Of {all} such classes in transformers, {tried} have been tried and {built} were built.
"""

STARS = """
A quantized model that is fused may differ by more than rounding where a rounding moves an int8 code. In such rows the
float model was fused as well, and the difference is the one of the float models, with a star.
"""

COLUMNS = {
    "class": "its name in transformers",
    "int8": "share of the model's bytes that are quantized. In tiny models embeddings and norms are a larger part than "
    "in real ones",
    "fused": "places that were fused, of those that `fuse_` looked at, with an example of {example} tokens and "
    '`attention="float32"`',
    "steps": "[which steps](fusion.md#the-steps) fused how many places",
    "kept": "why the other places stay as they are, by [number](#why-places-stay-as-they-are)",
    "short": "whether examples of 1 and of 2 tokens lead to the same places. Tried on some classes only: proving "
    "attention takes seconds",
    "difference": "largest difference of fused and unfused logits, relative to the largest logit: for texts of 24 and "
    "of 120 tokens, and for three tokens that `generate` writes, two of them with the cache",
}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, by class, of each class the last one; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {row["class"]: row for row in map(json.loads, lines)}
    return [rows[name] for name in sorted(rows)]


def page(rows: list[dict[str, Any]], example: str = "24") -> str:
    """The text of docs/models.md. The examples of most rows have `example` tokens."""
    built = [row for row in rows if "failure" not in row]
    reasons = _numbered(built, example)
    missing = [[row["class"], _plain(row["failure"])] for row in rows if "failure" in row]
    versions = ", ".join(sorted({row["transformers"] for row in rows}))
    counts = {"all": max(row["of"] for row in rows), "tried": len(rows), "built": len(built)}
    found = [f"- {line}" for line in disagreements(built)]
    parts = [
        "# Models",
        OPENING.format(versions=versions, **counts),
        tables.table(
            ["column", "what it says"], [[k, v.format(example=example)] for k, v in COLUMNS.items()]
        ),
        STARS,
        tables.table(list(COLUMNS), [_cells(row, reasons, example) for row in built]),
        "## Disagreements",
        "\n".join(found) or "None.",
        "## Why places stay as they are",
        "\n".join(f"{number}. {text}" for text, number in reasons.items()),
        "## Classes that were not built",
        "From a configuration with the small sizes of `benchmarks/model_classes.py`, in a few seconds.",
        tables.table(["class", "why"], missing) if missing else "None.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def disagreements(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What cannot be rounding, one line each."""
    for row in rows:
        for length, found in row.get("examples", {}).items():
            if "failure" in found:
                yield f"{row['class']}, example of {length} tokens: {_plain(found['failure'])}"
            for name, value in _decisive(found).items():
                if isinstance(value, str) or not value <= AGREES:
                    shown = value if isinstance(value, str) else f"differs by {value:.1e}"
                    yield f"{row['class']}, example of {length} tokens, {_text(name)}: {shown}"


def _decisive(found: dict[str, Any]) -> dict[str, Any]:
    """The differences of the float model if it was asked, because codes may have moved; else of the quantized one."""
    return found.get("float_differences", found.get("differences", {}))


def _text(name: str) -> str:
    return "decoding with the cache" if name == "cache" else f"text of {name} tokens"


def _numbered(rows: list[dict[str, Any]], example: str) -> dict[str, int]:
    """Reason -> its number, the most frequent one first."""
    counts = Counter(reason for row in rows for reason in _reasons(row, example))
    ordered = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return {reason: number for number, reason in enumerate(ordered, 1)}


def _reasons(row: dict[str, Any], example: str) -> set[str]:
    """Without what only tells one class from another: names of classes, numbers."""
    own = row["examples"][example].get("reasons", [])
    return {
        _plain(re.sub(rf"\b\w*(?:{re.escape(_family(row))})\w*\b", "this class", reason)) for reason in own
    }


def _family(row: dict[str, Any]) -> str:
    return re.split(r"For|LMHead|ModelWith", row["class"])[0]


def _cells(row: dict[str, Any], reasons: dict[str, int], example: str) -> list[str]:
    found = row["examples"][example]
    if "failure" in found:
        return [row["class"], f"{row['share']:.0%}", "error", "", "", "", ""]
    count = sum(found["fused"].values())
    kept = sorted(reasons[reason] for reason in _reasons(row, example))
    others = [each for length, each in row["examples"].items() if length != example]
    same = "same" if all(each.get("fused") == found["fused"] for each in others) else "**other**"
    values = list(_decisive(found).values())
    star = "*" if "float_differences" in found else ""
    texts = [value for value in values if isinstance(value, str)]
    largest = "" if not values else texts[0] if texts else f"{max(values):.0e}{star}"
    return [
        row["class"],
        f"{row['share']:.0%}",
        f"{count} of {found['places']}",
        ", ".join(f"{step} {number}" for step, number in found["fused"].items()),
        ", ".join(map(str, kept)),
        same if others else "",
        largest,
    ]


def _plain(text: str) -> str:
    """Text for a cell of a table: on one line, without marks of Markdown and without paths."""
    text = re.sub(r"/\S+/", "", text.partition("\n")[0]).replace("|", "/")
    return re.sub(r"[<>_*`\[\]]", lambda mark: f"\\{mark[0]}", text)
