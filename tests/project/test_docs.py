# SPDX-License-Identifier: Apache-2.0
"""The documents: every public name is in the reference with a docstring, links lead somewhere, the site builds."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import octavo

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [name for name in octavo.__all__ if name != "__version__"]
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_in_the_reference(name):
    listed = re.search(rf"^::: octavo\.{name}(\.{name})?$", API, re.MULTILINE)
    assert listed, f"add `::: octavo.{name}` to docs/api.md"


def undocumented(name: str, thing: object) -> list[str]:
    """`name`, and for a module its public functions and classes, as far as they have no docstring."""
    found = [] if inspect.getdoc(thing) else [name]
    if isinstance(thing, ModuleType):
        own = [
            part for part, value in vars(thing).items() if getattr(value, "__module__", "") == thing.__name__
        ]
        for part in getattr(thing, "__all__", own):
            member = getattr(thing, part)
            if not part.startswith("_") and (inspect.isclass(member) or inspect.isfunction(member)):
                found += undocumented(f"{name}.{part}", member)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring(name):
    assert undocumented(f"octavo.{name}", getattr(octavo, name)) == []


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and MkDocs make of the headings, as far as they agree."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_documents_lead_somewhere(path):
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{path.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{path.name} links to {target}: no such heading"


# --- the site -------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Everything a page points at, and every place in it that can be pointed at."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name in ("id", "name") and value:
                self.ids.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_name_document_and_notebook(site):
    ids = Links(site / "api.html").ids
    missing = [name for name in NAMES if not {f"octavo.{name}", f"octavo.{name}.{name}"} & ids]
    assert missing == []
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]:
        folder = "notebooks" if path.suffix == ".ipynb" else "."
        assert (site / folder / f"{path.stem}.html").exists()


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html")}
    for page, links in pages.items():
        if page.name == "404.html":  # its links are absolute: it is shown for any address
            continue
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https", "data", "mailto"):
                continue
            found = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{page.name}: {target}"
            if parts.fragment and found in pages:
                assert unquote(parts.fragment) in pages[found].ids, f"{page.name}: {target}"
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"https?:", text)


# --- how docstrings become Markdown ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs_site() -> ModuleType:
    pytest.importorskip("griffe")
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools/docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_columns_of_a_docstring_become_a_table_and_prose_stays(docs_site):
    columns = "x        [m, k] int8 | uint8,\n         finite\nraises   TypeError"
    docstring = f"What it returns.\n\n{columns}\n\nMore.\nSource: ours"
    assert docs_site.docstring_markdown(docstring).split("\n") == [
        "What it returns.",
        "",
        "",
        "| | |",
        "|---|---|",
        "| x | [m, k] int8 \\| uint8, finite |",
        "| raises | TypeError |",
        "",
        "",
        "More.",
        "",
        "**Source**: ours",
        "",
    ]


@pytest.mark.parametrize(
    "page, target, expected",
    [
        ("index.md", "../notebooks/00_number_formats.ipynb", "notebooks/00_number_formats.md"),
        ("index.md", "numerics.md#int8dynamic", "numerics.md#int8dynamic"),
        ("index.md", "../ARCHITECTURE.md", "ARCHITECTURE.md"),
        ("ARCHITECTURE.md", "docs/numerics.md", "numerics.md"),
        (
            "notebooks/00_number_formats.md",
            "01_quantize_a_model.ipynb",
            "../notebooks/01_quantize_a_model.md",
        ),
        ("notebooks/00_number_formats.md", "../docs/numerics.md", "../numerics.md"),
        ("index.md", "site.css", "site.css"),
        ("index.md", "https://pytorch.org", "https://pytorch.org"),
    ],
)
def test_links_between_files_become_links_between_pages(docs_site, page, target, expected):
    class File:
        src_uri = page

    class Page:
        file = File

    assert docs_site.on_page_markdown(f"see [it]({target}).", Page) == f"see [it]({expected})."
