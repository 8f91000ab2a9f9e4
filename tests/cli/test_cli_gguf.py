# SPDX-License-Identifier: Apache-2.0
"""The command line with GGUF files: what is in one, one into another, text that goes on, and a conversation."""

import json

import pytest
import torch

from octavo import cli

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_files import tiny, write

import octavo
from octavo.cli import chat
from octavo.huggingface.conversation import Conversation


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def path(tmp_path):
    return write("llama", tiny("llama"), tmp_path / "a.gguf", {"attn_q": "Q4_1", "": "Q8_0"})


class Letters:
    """A tokenizer of one token for each of 80 characters, and a template for conversations."""

    chat_template = "yes"
    eos_token_id = None

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % 77 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(33 + index) for index in ids)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        return self("|".join(message["content"] for message in messages) + ">")


def conversation(model, **options) -> Conversation:
    return Conversation(model, Letters(), **options)


def test_inspect_prints_types_sizes_and_metadata(path, capsys):
    assert run("inspect", path) == 0
    printed = capsys.readouterr().out
    assert "llama.block_count                       2" in printed
    assert "blk.0.attn_q.weight" in printed and "Q4_1" in printed
    assert "GGUF checkpoint: 16 of 21 layers quantized to" in printed
    assert run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["llama.embedding_length"] == 64
    row = next(layer for layer in found["layers"] if layer["name"] == "blk.0.attn_q.weight")
    assert row["bits_per_weight"] == 5.0 and row["shape"] == [64, 64]


def test_quantize_writes_one_file_into_another(path, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert run("quantize", path, out, "--scheme", "q5_0") == 0
    assert f"saved: {out}" in capsys.readouterr().out
    types = {layer.dtype for layer in octavo.inspect_checkpoint(out).layers}
    assert types == {"F32", "Q5_0"}
    assert run("quantize", path, tmp_path / "folder", "--scheme", "Q5_K_M") == 1
    assert "give an output that ends on .gguf" in capsys.readouterr().err
    assert run("quantize", path, out, "--exclude", "lm_head") == 1
    assert "--exclude is for folders" in capsys.readouterr().err


def test_generate_goes_on_with_a_text(path, monkeypatch, capsys):
    from octavo.cli import _folders

    model = octavo.load(path)
    monkeypatch.setattr(_folders, "open_model", lambda *_: (model, Letters()))
    assert run("generate", path, "--prompt", "abc", "--tokens", "5") == 0
    captured = capsys.readouterr()
    ids = torch.tensor([Letters()("abc")["input_ids"]])
    with torch.no_grad():
        expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)[0, 3:]
    assert captured.out == f"abc{Letters().decode(expected.tolist())}\n"
    assert "5 tokens, " in captured.err


def test_a_path_without_vocabulary_is_refused(path, capsys):
    assert run("generate", path, "--prompt", "abc") == 1
    assert "has no vocabulary, so text cannot become tokens" in capsys.readouterr().err


def test_an_answer_reads_only_what_is_new(path):
    """The cache has what was said before: the second answer equals that of a conversation that begins anew."""
    model = octavo.load(path)
    first = conversation(model, new_tokens=4)
    first_answer = "".join(first.ask("hello"))
    seen = len(first.seen)
    second_answer = "".join(first.ask("again"))
    assert len(first.seen) > seen and len(first_answer) == len(second_answer) == 4
    anew = conversation(model, new_tokens=4)
    anew.messages = first.messages[:2]
    assert "".join(anew.ask("again")) == second_answer
    assert first.tokens == 4 and first.tokens_per_second > 0


def test_what_is_drawn_follows_from_the_seed(path):
    model = octavo.load(path)
    answers = [
        "".join(conversation(model, new_tokens=6, temperature=2.0, seed=s).ask("hello")) for s in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_an_interrupt_ends_the_answer_and_not_the_conversation(path, capsys, monkeypatch):
    talk = conversation(octavo.load(path), new_tokens=8)
    go_on = talk.go_on

    def interrupted(prompt):
        for count, piece in enumerate(go_on(prompt)):
            if count == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(talk, "go_on", interrupted)
    chat._answer(talk, "hello")
    printed = capsys.readouterr().out
    assert printed.endswith(" ...\n")
    assert talk.messages[-1] == {"role": "assistant", "content": printed.removesuffix(" ...\n")}
    monkeypatch.setattr(talk, "go_on", go_on)
    chat._answer(talk, "again")
    assert len(talk.messages) == 4 and len(talk.messages[-1]["content"]) == 8


def test_a_conversation_needs_a_template(path):
    talk = conversation(octavo.load(path))
    talk.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        next(talk.ask("hello"))
