# SPDX-License-Identifier: Apache-2.0
"""One line loads what `octavo quantize` wrote, and a wrong config.json is one sentence with the file's name."""

import pytest
import torch
from tiny_models import (
    bert,
    check_equal_states,
    edit_config,
    folder_of,
    llama,
    llava,
    logits,
    mixtral,
    transformers,
)

import octavo
from octavo.conversion.folder import quantize_folder
from octavo.files import disk
from octavo.files.skeleton import skeleton
from octavo.huggingface import models as pretrained

DYNAMIC = octavo.Int8Dynamic()


@pytest.fixture
def source(tmp_path):
    return folder_of(llama(), tmp_path / "source")


@pytest.mark.parametrize("make", [llama, bert, mixtral, llava])
def test_load_needs_no_skeleton_for_a_folder_of_transformers(tmp_path, make):
    quantize_folder(folder_of(make(), tmp_path / "source"), tmp_path / "int8", DYNAMIC)
    expected = pretrained.load_model(tmp_path / "source")
    joined = make is mixtral  # experts, which stay float in folders
    octavo.quantize_(expected, DYNAMIC, exclude="*.experts.*" if joined else None)
    loaded = octavo.load(tmp_path / "int8")
    check_equal_states(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize(
    "make",
    [
        llama,
        bert,
        mixtral,
        lambda: llama(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    ],
)
def test_a_skeleton_of_the_user_on_the_meta_device_is_filled_whole_and_put_into_eval_mode(tmp_path, make):
    quantize_folder(folder_of(make(), tmp_path / "source"), tmp_path / "int8", DYNAMIC)
    expected = octavo.load(tmp_path / "int8")
    with torch.device("meta"):
        given = make().train()
    loaded = octavo.load(tmp_path / "int8", given)
    check_equal_states(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert not any(module.training for module in loaded.modules())


def test_a_skeleton_that_is_not_tied_yet_is_tied_as_its_class_says(tmp_path):
    """Some versions of transformers, 5.0 among them, tie nothing on the meta device."""
    quantize_folder(folder_of(bert(), tmp_path / "source"), tmp_path / "int8", DYNAMIC)
    with torch.device("meta"):
        given = bert()
        given.cls.predictions.decoder.weight = torch.nn.Parameter(torch.empty(64, 32), requires_grad=False)
    loaded = octavo.load(tmp_path / "int8", given)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    check_equal_states(loaded, octavo.load(tmp_path / "int8"))


def test_a_skeleton_that_is_refused_is_not_tied(tmp_path):
    quantize_folder(folder_of(llama(), tmp_path / "source"), tmp_path / "int8", DYNAMIC)
    with torch.device("meta"):
        given = bert()
        given.cls.predictions.decoder.weight = untied = torch.nn.Parameter(torch.empty(64, 32))
    with pytest.raises(ValueError, match="skeleton"):
        octavo.load(tmp_path / "int8", given)
    assert given.cls.predictions.decoder.weight is untied


def test_the_demo_model_comes_back_into_a_skeleton_of_auto_model(tmp_path, caplog):
    """Its file holds position_ids, which today's class computes."""
    quantize_folder(pretrained.bundled_folder(), tmp_path / "int8", DYNAMIC)
    with torch.device("meta"):
        given = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "int8"))
    check_equal_states(octavo.load(tmp_path / "int8", given), octavo.load(tmp_path / "int8"))
    assert given.embeddings.position_ids.tolist() == [list(range(512))] and caplog.text == ""


def test_a_folder_without_a_config_asks_for_a_skeleton(tmp_path):
    octavo.save(octavo.quantized(torch.nn.Sequential(torch.nn.Linear(4, 4)), DYNAMIC), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no config.json.*give the float model.*as skeleton"):
        octavo.load(tmp_path)


def test_save_quantized_is_loaded_in_one_line(tmp_path):
    model = llama()
    octavo.quantize_(model, octavo.Int8Static(), data=torch.arange(24).reshape(2, 12))
    tokenizer = pretrained.load_tokenizer(pretrained.bundled_folder())
    pretrained.save_quantized(model, tokenizer, tmp_path)
    check_equal_states(octavo.load(tmp_path), model)


def test_save_quantized_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    """Whatever fails, the tokenizer too; a killed process leaves what the next reader finds, config.json with it."""

    class FullDisk:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    old, new = (
        octavo.quantized(llama(**size), octavo.Int8Dynamic()) for size in ({}, {"intermediate_size": 64})
    )
    tokenizer = pretrained.load_tokenizer(pretrained.bundled_folder())
    pretrained.save_quantized(old, tokenizer, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="no space left"):
        pretrained.save_quantized(new, FullDisk(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    def killed(folder, key):
        if (folder / disk.PENDING).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(disk, "_settle", killed)
        pretrained.save_quantized(new, tokenizer, tmp_path)
    check_equal_states(octavo.load(tmp_path), new)
    pretrained.save_quantized(new, tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files.keys()
    check_equal_states(octavo.load(tmp_path), new)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dtype": "float12"}, "float12"),
        ({"hidden_act": "gelo"}, "gelo"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, a number of 0 or more"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_hidden_layers": None}, "num_hidden_layers|NoneType"),
        ({"model_type": "nothing"}, "nothing"),
        ({"model_type": 7}, "7"),
        ({"architectures": "LlamaForCausalLM"}, "class as None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "LlamaForCausalLM"),
    ],
    ids=str,
)
def test_a_wrong_value_in_config_json_is_one_sentence_with_the_name_of_the_file(source, fields, message):
    edit_config(source, **fields)
    before = torch.get_default_dtype()
    with pytest.raises(ValueError, match=message) as raised:
        skeleton(source)
    assert str(source / "config.json") in str(raised.value) and "\n" not in str(raised.value)
    assert torch.get_default_dtype() == before


def test_negative_numbers_that_mean_something_are_no_errors(source):
    edit_config(source, pad_token_id=-1)
    assert skeleton(source).config.pad_token_id == -1


def test_folders_of_sentence_transformers_come_back_as_the_documentation_says(tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    encoder = SentenceTransformer(str(pretrained.bundled_folder()), device="cpu")
    encoder.append(Dense(384, 32))
    encoder.save_pretrained(str(tmp_path / "float"))
    octavo.quantize_(encoder, DYNAMIC)
    octavo.save(encoder, tmp_path / "whole")
    other = SentenceTransformer(str(tmp_path / "float"), device="cpu")
    check_equal_states(octavo.load(tmp_path / "whole", other), encoder)
    assert (other.encode(["a text"]) == encoder.encode(["a text"])).all()
    encoder.save_pretrained(str(tmp_path / "theirs"))
    quantize_folder(tmp_path / "float", tmp_path / "ours", DYNAMIC)
    for folder in ("theirs", "ours"):
        other = SentenceTransformer(str(tmp_path / "float"), device="cpu")
        check_equal_states(octavo.load(tmp_path / folder, other[0].model), encoder[0].model)
