# SPDX-License-Identifier: Apache-2.0
"""What MkDocs needs to know about this project: notebooks as pages, links that work here and there, our docstrings.

Documents link to each other, to notebooks and to the pages of the root as files of the repository, so that the links
work where it is browsed; for the site they are rewritten. A document added to docs/ is in the navigation by itself.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROJECT_PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
GUIDES_FIRST = ("numerics.md", "packed_format.md", "behaviour.md")  # then the others, by name


def on_config(config: Any) -> Any:
    """The navigation: start, notebooks, guides, reference, project."""
    documents = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    guides = [name for name in documents if name not in ("index.md", "api.md", *GUIDES_FIRST)]
    config.nav = [
        {"Start": "index.md"},
        {"Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks()]},
        {"Guides": [*GUIDES_FIRST, *guides]},
        {"Reference": ["api.md"]},
        {"Project": list(PROJECT_PAGES)},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the notebooks with their pictures, and the documents of the root."""
    for name in PROJECT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in notebooks():
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between pages."""
    folder = Path(page.file.src_uri).parent
    source = folder if page.file.src_uri in PROJECT_PAGES or folder.name == "notebooks" else Path("docs")
    return re.sub(
        r"\]\((?!\w+:|#)([^)\s]+)\)", lambda match: f"]({_page_link(match[1], source, folder)})", markdown
    )


def _page_link(target: str, source: Path, folder: Path) -> str:
    """`target`, written in a file of the folder `source`, for a page in the site's `folder`."""
    path, hash_mark, anchor = target.partition("#")
    file = (ROOT / source / path).resolve()
    if not file.is_relative_to(ROOT) or file.suffix not in (".md", ".ipynb"):
        return target
    place = file.relative_to(ROOT)
    if place.parts[0] == "docs":
        place = Path(*place.parts[1:])
    page = place.with_suffix(".md").as_posix()
    return "../" * len(folder.parts) + page + hash_mark + anchor


# --- notebooks ------------------------------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures by file name."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for index, output in enumerate(cell["outputs"]):
            name = f"{path.stem}_{number}_{index}.png"
            picture = output.get("data", {}).get("image/png")
            if picture:
                pictures[name] = base64.b64decode(picture)
            parts.append(_output(output, name))
    return "\n\n".join(parts) + "\n", pictures


def _output(output: dict[str, Any], picture: str) -> str:
    """The richest form that the notebook stored."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output]({picture})"
    if "text/html" in data:
        html = re.sub(r"\s*\n\s*", " ", "".join(data["text/html"]))  # a blank line would end it for Markdown
        return f'<div class="output">{html}</div>'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f'<div class="output" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>'


# --- docstrings -----------------------------------------------------------------------------------------------------


class Docstrings(griffe.Extension):
    """Our docstrings as Markdown: prose as prose, and the columns of names and meanings as a table."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = docstring_markdown(obj.docstring.value)


def docstring_markdown(text: str) -> str:
    """Entries `name  meaning`, with the lines indented below them, become tables; Raises and Source new paragraphs."""
    parts: list[str] = []
    entries: list[list[str]] = []
    for line in [*text.strip().split("\n"), ""]:
        entry = re.match(r"(\S(?:\S| (?! ))*)  +(\S.*)", line)
        if entry:
            entries.append([entry[1], entry[2]])
        elif entries and line.startswith(" "):
            entries[-1][1] += " " + line.strip()
        else:
            parts += [_table(entries)] if entries else []
            entries = []
            parts.append(re.sub(r"^(Raises|Source|Returns): ", r"\n**\1**: ", line))
    return "\n".join(parts)


def _table(entries: list[list[str]]) -> str:
    rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in entry)} |" for entry in entries]
    return "\n".join(["", "| | |", "|---|---|", *rows, ""])
