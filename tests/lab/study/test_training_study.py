# SPDX-License-Identifier: Apache-2.0
"""The study of training: the float model stands beside each scheme, nothing held out is trained on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo import cli
from octavo.lab.study import byte_text, training_study
from octavo.lab.study.byte_training import TrainingConfig
from octavo.lab.study.training_result import FLOAT, LEARNED_SCALES, NONE, STRAIGHT_THROUGH, TrainingResult
from octavo.schemes import SCHEMES, label

ROOT = Path(__file__).parents[3]
MARKS = TrainingResult.MARKS
TINY = training_study.TrainingStudySettings(
    TrainingConfig(steps=4, batch=4, warmup=1), (1e-3, 1e-3), calibration_windows=2, windows=4
)


@pytest.fixture(scope="module")
def result() -> TrainingResult:
    return training_study.run(training_study.variants([octavo.Int8Dynamic])[-1:], settings=TINY)


def by_training(result: TrainingResult, name: str) -> dict:
    return {row.training: row for row in result.rows if row.name == name}


def without_times(result: TrainingResult) -> list:
    return [dataclasses.replace(row, cpu_seconds=0) for row in result.rows]


def test_the_float_model_comes_first_and_then_the_scheme_in_every_way_of_training(result):
    ways = (NONE, FLOAT, STRAIGHT_THROUGH, LEARNED_SCALES)
    expected = [
        ("fp32", NONE),
        ("fp32", FLOAT),
        *(("Int8Dynamic(weights=CoarseInt8(2))", way) for way in ways),
    ]
    assert [(row.name, row.training) for row in result.rows] == expected
    assert result.rows[0].kld == 0 and result.rows[0].top1_agreement == 1
    assert result.rows[1].kld > 0 and result.rows[1].excess == 0
    assert [row.cpu_seconds > 0 for row in result.rows] == [False, True, False, False, True, True]


def test_two_bits_cost_much_and_a_few_steps_through_the_rounding_win_some_of_it_back(result):
    """That the float model trained as long does not win it back: rounding undoes it."""
    rows = by_training(result, "Int8Dynamic(weights=CoarseInt8(2))")
    assert rows[NONE].perplexity > 2 * result.rows[0].perplexity
    for training in (STRAIGHT_THROUGH, LEARNED_SCALES):
        assert rows[training].perplexity < min(rows[NONE].perplexity, rows[FLOAT].perplexity)


def test_the_figures_do_not_depend_on_the_number_of_threads(result):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        schemes = training_study.variants([octavo.Int8Dynamic])[-1:]
        assert without_times(training_study.run(schemes, settings=TINY)) == without_times(result)
    finally:
        torch.set_num_threads(before)


def test_no_held_out_window_is_trained_on(monkeypatch):
    texts = []

    def watched(model, text, config, after_step):
        texts.append(bytes(text.numpy()))
        after_step(1, 0.0)

    monkeypatch.setattr(training_study, "train", watched)
    training_study.run([], settings=TINY)
    windows = [bytes(window.to(torch.uint8).numpy()) for window in byte_text.held_out(TINY.windows)]
    assert texts and not any(window in text for text in texts for window in windows)


def test_fewer_than_four_bits_are_trained_with_the_second_learning_rate():
    settings = dataclasses.replace(TINY, learning_rates=(1e-9, 1e-4), windows=1)
    result = training_study.run(
        [octavo.Int8WeightOnly(weights=octavo.formats.CoarseInt8(bits)) for bits in (4, 3)], settings=settings
    )
    rates = {row.name: row.learning_rate for row in result.rows if row.training == STRAIGHT_THROUGH}
    assert rates == {
        "Int8WeightOnly(weights=CoarseInt8(4))": 1e-9,
        "Int8WeightOnly(weights=CoarseInt8(3))": 1e-4,
    }
    assert (
        result.rows[1].learning_rate == 1e-9 and result.rows[1].kld < 1e-6
    )  # float: it moved no weight by much


def learns_scales(scheme):
    try:
        return scheme.prepare_linear(nn.Linear(32, 32), learn_scales=True) is not None
    except ValueError as error:  # fixed scales, or none
        assert "learn_scales" in str(error)
        return False


def test_every_registered_scheme_can_be_trained():
    settings = dataclasses.replace(TINY, training=TrainingConfig(steps=1, batch=1, warmup=1), windows=1)
    schemes = [
        scheme(weights=octavo.formats.CoarseInt8(4))
        if scheme().weights == octavo.formats.Int8()
        else scheme()
        for scheme in SCHEMES.values()
        if learns_scales(scheme())
    ]
    result = training_study.run(schemes, settings=settings)
    assert [row.name for row in result.rows[2::4]] == [label(scheme) for scheme in schemes]
    assert all(row.perplexity < 256 for row in result.rows)


def test_json_brings_the_same_result_back(result):
    assert TrainingResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["tables", "json"])
def test_the_command_writes_the_files_and_the_document(result, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_study, "QUICK", TINY)
    monkeypatch.setattr(training_study, "BITS", (4,))
    document = tmp_path / "study.md"
    document.write_text("\n".join(MARKS), encoding="utf-8")
    arguments = ["--train", "--quick", "--schemes", "int8-weight-only", "--into", str(document), *flags]
    assert cli.main(["study", "--output", str(tmp_path / "out"), *arguments]) == 0
    printed = capsys.readouterr().out
    found = TrainingResult.from_dict(json.loads((tmp_path / "out" / "study-training.json").read_text()))
    assert {row.name for row in found.rows} == {"fp32", "Int8WeightOnly(weights=CoarseInt8(4))"}
    assert found.to_markdown() in document.read_text(encoding="utf-8")
    assert (json.loads(printed) == found.to_dict()) if flags else (printed == f"{found}\n")


def test_the_documented_table_is_the_committed_result():
    fields = json.loads((ROOT / "benchmarks/results/study-training.json").read_text())
    text = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    generated = text[text.index(MARKS[0]) + len(MARKS[0]) : text.index(MARKS[1])]
    assert generated == "\n" + TrainingResult.from_dict(fields).to_markdown()
