# SPDX-License-Identifier: Apache-2.0
"""The study's tables, files and plot say what its rows say; the front is what nothing beats."""

import dataclasses
import json

import pytest

from octavo.lab.study.study_result import StudyResult, StudyRow

MARKS = StudyResult.MARKS
MACHINE = {"cpu": "a <CPU>", "active_isa": "avx2", "threads": 1, "torch": "2", "python": "3.11.7"}
SETTINGS = {"windows": 320, "context": 128, "prompts": 48, "prompt_bytes": 64, "new_bytes": 64, "rounds": 15}
FLOAT = StudyRow(
    name="fp32",
    scheme={},
    perplexity=2.9567,
    kld=0.0,
    kld_standard_error=0.0,
    top1_agreement=1.0,
    accuracy=0.6876,
    flips=0.0,
    first_difference=64.0,
    identical=1.0,
    prefill_kld=0.0,
    prefill_rejection_rate=0.0,
    generation_kld=0.0,
    generation_rejection_rate=0.0,
    bits_per_weight=32.0,
    bytes_on_disk=3_400_000,
    milliseconds={"1x128": 2.0},
    speedup={"1x128": 1.0},
)


def row(name: str, bits: float, kld: float) -> StudyRow:
    return dataclasses.replace(
        FLOAT,
        name=name,
        scheme={"name": name},
        bits_per_weight=bits,
        kld=kld,
        kld_standard_error=kld / 50,
        milliseconds={"1x128": 1.0},
        speedup={"1x128": 2.0},
    )


@pytest.fixture
def result() -> StudyResult:
    schemes = [row("W8", 8.2, 1e-4), row("W8A8", 8.2, 4e-4), row("W4", 4.5, 2e-2), row("W5-bad", 5.5, 3e-2)]
    return StudyResult([FLOAT, *schemes], SETTINGS, MACHINE)


def test_the_front_holds_what_no_other_scheme_beats_in_size_and_closeness(result):
    assert [row.name for row in result.pareto_front()] == ["W4", "W8"]


def test_equal_schemes_share_one_place_on_the_front():
    twins = StudyResult([FLOAT, row("a", 8.0, 1e-4), row("b", 8.0, 1e-4)], SETTINGS, MACHINE)
    assert [row.name for row in twins.pareto_front()] == ["a"]


def test_json_brings_the_same_result_back(result):
    assert StudyResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_every_face_shows_every_scheme_and_figure(result):
    for text in (str(result), result.to_markdown(), result._repr_html_()):
        for shown in (
            "fp32",
            "W5-bad",
            "0.000400 ± 0.000008",
            "68.76%",
            "8.20",
            "2.00x",
            "40,960 held-out bytes",
        ):
            assert shown in text
    assert "a &lt;CPU&gt;" in result._repr_html_()


def test_markdown_tables_have_as_many_cells_in_each_line(result):
    tables = [block for block in result.to_markdown().split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        lines = table.splitlines()
        assert len(lines) == 2 + len(result.rows)
        assert len({line.count("|") for line in lines}) == 1


def test_save_writes_what_the_result_says(result, tmp_path):
    pytest.importorskip("matplotlib")
    paths = result.save(tmp_path / "new")
    assert [path.name for path in paths] == ["study.json", "study.md", "study.png"]
    assert StudyResult.from_dict(json.loads(paths[0].read_text())) == result
    assert paths[1].read_text(encoding="utf-8") == result.to_markdown()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_tables_are_written_between_the_marks_and_again(result, tmp_path):
    document = tmp_path / "a.md"
    document.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    for _ in range(2):
        result.write_into(document)
        expected = f"before\n{MARKS[0]}\n{result.to_markdown()}{MARKS[1]}\nafter\n"
        assert document.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("text", ["no marks", MARKS[0], f"{MARKS[1]} {MARKS[0]}"])
def test_a_document_without_marks_is_refused_and_stays(result, tmp_path, text):
    document = tmp_path / "a.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="has no lines <!-- octavo study -->"):
        result.write_into(document)
    assert document.read_text() == text


def test_the_plot_has_a_point_for_each_scheme_and_the_front_as_its_line(result):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = result.plot()
    front = next(line for line in ax.get_lines() if line.get_label() == "Pareto front")
    assert front.get_xydata().tolist() == [[4.5, 2e-2], [8.2, 1e-4]]
    assert [text.get_text() for text in ax.texts] == ["W8", "W8A8", "W4", "W5-bad"]
    assert ax.get_yscale() == "log"
    pyplot.close(ax.figure)
