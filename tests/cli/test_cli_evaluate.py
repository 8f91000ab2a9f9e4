# SPDX-License-Identifier: Apache-2.0
"""`octavo evaluate` on small transformers models: the numbers are those of `octavo.evaluate`, in the form asked for."""

import json

import pytest
import torch

import octavo
from octavo import cli
from octavo.cli import evaluate as command
from octavo.huggingface import models as pretrained

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=80, vocab_size=30522
)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.load_tokenizer(pretrained.bundled_folder())


@pytest.fixture(scope="module", params=["BertModel", "LlamaForCausalLM"])
def folders(request, tokenizer, tmp_path_factory):
    """A tiny random model with a real tokenizer, and the same quantized."""
    torch.manual_seed(0)
    make = getattr(transformers, request.param)
    model = make(make.config_class(**SMALL)).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    octavo.quantize_(model, octavo.Int8Dynamic())
    pretrained.save_quantized(model, tokenizer, folder / "int8")
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    lines = [
        "A first line of text.",
        "",
        "And a second one, which is longer.",
        "The third is of another length yet.",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(folders, text, capsys, *options):
    arguments = ["evaluate", folders / "float", folders / "int8", "--text", text, "--new-tokens", 2, *options]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_json_holds_what_evaluate_finds(folders, text, capsys, tokenizer):
    found = json.loads(run(folders, text, capsys, "--json"))
    reference = pretrained.load_model(folders / "float")
    model = pretrained.load_quantized(folders / "int8")
    if found["kind"] == "encoder":
        lines = [line for line in text.read_text().splitlines() if line]
        expected = octavo.evaluate(
            reference, model, pretrained.unpadded_batches(tokenizer, lines), resources=()
        )
        assert found["vectors"] == expected.to_dict()["vectors"] and found["vectors"]["vectors"] == 3
    else:
        ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
        bytes_per_token = len(text.read_bytes()) / len(ids)
        expected = octavo.evaluate(reference, model, ids[None], resources=(), bytes_per_token=bytes_per_token)
        assert found["distribution"] == expected.to_dict()["distribution"]
        assert found["distribution"]["tokens"] == len(ids) - 1
        assert found["generation"]["new_tokens"] == 2
    assert found["schemes"] == {"Int8Dynamic": 7 if found["kind"] == "encoder" else 8}
    assert found["resources"]["model"]["bytes_on_disk"] < found["resources"]["reference"]["bytes_on_disk"]


def test_text_markdown_and_tables_hold_the_same_rows(folders, text, capsys, monkeypatch):
    texts = [run(folders, text, capsys), run(folders, text, capsys, "--markdown")]
    assert texts[1].startswith("**Octavo evaluation**")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    texts.append(run(folders, text, capsys))
    for label in ("Output", "SQNR", "Resources", "bits per weight", "reference", "model"):
        assert all(label in printed for printed in texts), label


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert command.HELP in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_file_without_text_is_named(folders, tmp_path, capsys, content):
    (tmp_path / "empty.txt").write_text(content)
    arguments = ["evaluate", folders / "float", folders / "int8", "--text", tmp_path / "empty.txt"]
    assert cli.main([str(argument) for argument in arguments]) == 1
    assert capsys.readouterr().err.endswith("empty.txt holds no text\n")
