# SPDX-License-Identifier: Apache-2.0
"""The examples of README and docs/, run page by page as a reader would, print what the pages say they print.

A block of Python is run. A block without a language right behind it is its output. Other blocks hold commands: those of
Octavo are parsed. A block that starts with "# a sketch" needs what a test does not have, and says what.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from packaging.version import Version

from octavo import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SKETCH = "# a sketch"
NEWER = re.compile(r"# transformers (\d+)\.(\d+) or newer")  # at the start of a block
# A fenced block, and whether the next one follows after nothing but an empty line.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n(?=(\n```\n)?)", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, bool]]:
    """(language, text, whether an output follows) of each block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(language, code, bool(follows)) for language, code, follows in BLOCK.findall(text)]


def examples(page: Path) -> list[tuple[str, str | None]]:
    """Blocks of Python, sketches left out, each with the output that the page shows."""
    found = blocks(page)
    return [
        (code, found[number + 1][1] if follows else None)
        for number, (language, code, follows) in enumerate(found)
        if language == "python" and not code.startswith(SKETCH)
    ]


def commands(page: Path) -> list[str]:
    """Calls of octavo in the blocks that are neither Python nor its output; what may be left out is left out."""
    found = blocks(page)
    is_output = [False, *(language == "python" and follows for language, _, follows in found)]
    text = "".join(
        code
        for (language, code, _), output in zip(found, is_output, strict=False)
        if not language and not output
    )
    lines = [re.split(r"\s{2,}|\[|#", line)[0] for line in text.splitlines()]
    return [line for line in lines if line.startswith("octavo ")]


def needs_newer_transformers(code: str) -> bool:
    found = NEWER.match(code)
    transformers = pytest.importorskip("transformers")
    return found is not None and Version(transformers.__version__) < Version(".".join(found.groups()))


def run_tests_of(code: str, namespace: dict[str, object], request: pytest.FixtureRequest) -> None:
    """Runs the tests that a block defines, as pytest would."""
    for name in re.findall(r"^def (test_\w+)\(octavo_accuracy\)", code, re.MULTILINE):
        namespace[name](request.getfixturevalue("octavo_accuracy"))  # type: ignore[operator]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_print_what_it_shows(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # some of them save a model
    namespace: dict[str, object] = {}
    for code, expected in examples(page):
        if needs_newer_transformers(code):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), namespace)
            run_tests_of(code, namespace, request)
        assert expected is None or printed.getvalue() == expected


def test_the_commands_of_the_pages_are_understood():
    found = [(page.name, line) for page in PAGES for line in commands(page)]
    assert len(found) >= 5
    for name, line in found:
        for part in line.split("&&"):
            try:
                cli._parser().parse_args(shlex.split(part)[1:])
            except SystemExit:
                pytest.fail(f"{name}: {line}")


def test_readme_shows_outputs():
    assert sum(expected is not None for _, expected in examples(ROOT / "README.md")) >= 5


def test_sketches_say_what_they_need():
    sketches = [
        (page.name, code.splitlines()[0])
        for page in PAGES
        for _, code, _ in blocks(page)
        if code.startswith(SKETCH)
    ]
    for name, line in sketches:
        assert re.match(rf"{SKETCH}: needs \w+", line), f"{name}: {line}"
    pytest.skip(f"{len(sketches)} sketches are not run: {sketches}")
