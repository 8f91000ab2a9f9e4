# SPDX-License-Identifier: Apache-2.0
"""The study measures whatever is registered, the same on any number of threads; the documented tables are its own."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import octavo
from octavo import cli
from octavo.formats import CoarseInt8, WeightFormat
from octavo.lab.study import byte_text, study
from octavo.lab.study.study_result import StudyResult, StudyRow
from octavo.observers import MinMax, Percentile
from octavo.schemes import SCHEMES, label

MARKS = StudyResult.MARKS
ROOT = Path(__file__).parents[3]
TINY = study.StudySettings(
    calibration_windows=2, windows=4, prompts=2, prompt_bytes=16, new_bytes=4, shapes=((1, 8),), rounds=1
)


@dataclass(frozen=True)
class Coarse(octavo.Int8WeightOnly):
    """Weights of four bits: plainly worse than eight."""

    weights: WeightFormat = field(default=CoarseInt8(4), kw_only=True)


def run_with_coarse() -> StudyResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEMES, "Coarse", Coarse)
        return study.run(settings=TINY)


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return run_with_coarse()


def named(result: StudyResult, name: str) -> StudyRow:
    return next(row for row in result.rows if row.name == name)


def without_times(result: StudyResult) -> list[StudyRow]:
    return [dataclasses.replace(row, milliseconds={}, speedup={}) for row in result.rows]


def test_the_float_model_comes_first_and_equals_itself(result):
    row = result.rows[0]
    assert row.name == "fp32" and row.scheme == {} and row.bits_per_weight == 32
    assert (row.kld, row.kld_standard_error, row.prefill_kld, row.generation_kld) == (0, 0, 0, 0)
    assert (row.top1_agreement, row.identical, row.flips) == (1, 1, 0)
    assert row.first_difference == TINY.new_bytes


def test_every_registered_scheme_is_measured_in_its_variants(result):
    """Being in the registry is enough: Coarse is known to this file alone."""
    names = [row.name for row in result.schemes]
    assert sorted(names) == sorted([*map(study.label, study.registered_schemes()), "Coarse"])
    assert {row.scheme["name"] for row in result.schemes} == {*SCHEMES, "Coarse"}
    assert {"Int8Dynamic(symmetric=False)", "Int8Static(MinMax)", "Int8Static(Percentile(99.9))"} <= set(
        names
    )
    for row in result.schemes:
        assert row.kld > 0 and row.bytes_on_disk < result.rows[0].bytes_on_disk
        assert row.scheme["name"] == row.name.partition("(")[0]


def test_coarser_weights_are_further_from_float(result):
    klds = [named(result, name).kld for name in ("Int8WeightOnly", "Int8Dynamic", "Coarse")]
    assert klds == sorted(klds)


def test_int8_with_a_scale_for_each_row_takes_8_bits_and_32_for_each_scale(result):
    """Of the 4 layers of a block, three have rows of 128 weights (3 + 1 + 4 units of 128 rows), one of 512 (1 unit)."""
    scales, weights = 3 + 1 + 4 + 1, (3 + 1 + 4) * 128 + 512
    assert named(result, "Int8WeightOnly").bits_per_weight == pytest.approx(8 + 32 * scales / weights)


def test_the_figures_do_not_depend_on_the_number_of_threads(result):
    """Of one scheme for each product: layers of every scheme are held to it elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        again = study.run([octavo.Int8Dynamic(), octavo.Int8WeightOnly()], settings=TINY)
        assert torch.get_num_threads() == (2 if before == 1 else 1)
    finally:
        torch.set_num_threads(before)
    names = [row.name for row in again.rows]
    assert names == ["fp32", "Int8Dynamic", "Int8WeightOnly"]
    assert without_times(again) == [row for row in without_times(result) if row.name in names]


def test_schemes_calibrate_on_the_training_text_alone(monkeypatch):
    """One window of it, all of the same byte, gives other scales than the text that is measured."""
    zeros = torch.zeros(1000, dtype=torch.uint8)
    usual = study.run([octavo.Int8Static()], settings=TINY).schemes[0].kld
    monkeypatch.setattr(byte_text, "training_bytes", lambda: zeros)
    assert study.run([octavo.Int8Static()], settings=TINY).schemes[0].kld > 2 * usual


LABELS = {
    "Int8Dynamic": octavo.Int8Dynamic(),
    "Int8Dynamic(symmetric=False)": octavo.Int8Dynamic(symmetric=False),
    "Int8WeightOnly(weights=CoarseInt8(4))": octavo.Int8WeightOnly(weights=octavo.formats.CoarseInt8(4)),
    "Int8Static(Percentile(99.9), symmetric=False)": octavo.Int8Static(Percentile(99.9), symmetric=False),
    "Int8Dynamic(method=SmoothQuant)": octavo.Int8Dynamic(method=octavo.SmoothQuant()),
    "Int8Static(MinMax, method=SmoothQuant(0.7))": octavo.Int8Static(
        MinMax(), method=octavo.SmoothQuant(0.7)
    ),
    "LLMInt8(4.0)": octavo.LLMInt8(4.0),
}


@pytest.mark.parametrize("text", LABELS)
def test_a_label_names_what_is_not_at_its_default_as_one_writes_it(text):
    assert label(LABELS[text]) == text


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["tables", "json"])
def test_the_command_writes_the_files_and_the_document(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study, "QUICK", TINY)
    document = tmp_path / "study.md"
    document.write_text("\n".join(MARKS), encoding="utf-8")
    arguments = ["--quick", "--schemes", "int8-weight-only", "--into", str(document), *flags]
    assert cli.main(["study", "--output", str(tmp_path / "out"), *arguments]) == 0
    printed = capsys.readouterr().out
    result = StudyResult.from_dict(json.loads((tmp_path / "out" / "study.json").read_text()))
    assert [row.name for row in result.rows] == ["fp32", "Int8WeightOnly"]
    assert result.to_markdown() in document.read_text(encoding="utf-8")
    assert (json.loads(printed) == result.to_dict()) if flags else (printed == f"{result}\n")


def test_the_documented_tables_are_the_committed_results():
    fields = json.loads((ROOT / "benchmarks/results/study.json").read_text())
    text = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    generated = text[text.index(MARKS[0]) + len(MARKS[0]) : text.index(MARKS[1])]
    assert generated == "\n" + StudyResult.from_dict(fields).to_markdown()
