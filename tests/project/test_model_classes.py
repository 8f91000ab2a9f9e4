# SPDX-License-Identifier: Apache-2.0
"""docs/models.md: the page is what the committed rows say, rows are measured, and a disagreement is never lost."""

import copy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import model_classes
import model_classes_page

ROW = {
    "class": "OnceForCausalLM",
    "transformers": "5.24.0",
    "of": 2,
    "share": 0.9,
    "examples": {
        "24": {
            "places": 3,
            "fused": {"attention": 1, "norms": 1},
            "reasons": ["gated: OnceMLP computes something else"],
            "differences": {"24": 1e-7, "120": 0.01, "cache": 2e-7},
            "float_differences": {"24": 1e-7, "120": 3e-7, "cache": 2e-7},
        }
    },
}


def test_the_page_is_written_from_the_committed_rows():
    rows = model_classes_page.read(model_classes.RESULTS)
    assert model_classes.PAGE.read_text(encoding="utf-8") == model_classes_page.page(rows), (
        "run python benchmarks/model_classes.py page"
    )
    assert list(model_classes_page.disagreements(rows)) == []


def test_a_row_has_share_places_and_agreement():
    row = model_classes.try_class("GPT2LMHeadModel")
    assert 0.5 < row["share"] < 1 and row["kept"] == {"Embedding": 2, "LayerNorm": 5}
    (found,) = row["examples"].values()
    assert found["fused"] == {"activations": 2, "attention": 1}
    assert found["differences"].keys() == {"24", "120", "cache"}
    assert list(model_classes_page.disagreements([row])) == []


def test_a_class_that_is_not_built_says_why(monkeypatch):
    monkeypatch.setitem(model_classes.SIZES, "hidden_size", -1)
    assert "Error: " in model_classes.try_class("LlamaForCausalLM")["failure"]


def test_moved_codes_are_told_from_another_formula():
    assert list(model_classes_page.disagreements([ROW])) == []
    text = model_classes_page.page(
        [ROW, {"class": "Twice", "transformers": "5.24.0", "of": 2, "failure": "KeyError: 'a|b'"}]
    )
    assert "| OnceForCausalLM | 90% | 2 of 3 | attention 1, norms 1 | 1 |  | 3e-07* |" in text
    assert "1. gated: this class computes something else" in text and "| Twice | KeyError: 'a/b' |" in text
    other = copy.deepcopy(ROW)
    other["examples"]["24"]["float_differences"]["cache"] = 0.5
    other["examples"]["1"] = {"failure": "RuntimeError: no"}
    assert len(list(model_classes_page.disagreements([other]))) == 2
    assert "decoding with the cache: differs by 5.0e-01" in model_classes_page.page([other])
