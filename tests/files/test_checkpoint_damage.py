# SPDX-License-Identifier: Apache-2.0
"""Bad files: each gives a clear error of `load`, and the skeleton stays as it was."""

import json
import math
import os
import re

import pytest
import torch
from checkpoints import check_refused, edit_config, edit_tensors, meta_skeleton, quantized_model
from safetensors.torch import save_file
from test_files import LFS_POINTER, NOT_TO_BE_READ
from torch import nn

import octavo


@pytest.fixture
def folder(tmp_path):
    octavo.save(quantized_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("missing", ["octavo.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    check_refused(folder, meta_skeleton(), FileNotFoundError, missing)


def test_a_missing_folder_is_named(tmp_path):
    check_refused(tmp_path / "nowhere", meta_skeleton(), FileNotFoundError, "nowhere")


@pytest.mark.parametrize("file", ["model.safetensors", "buffers.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(folder, file, keep):
    size = (folder / file).stat().st_size
    os.truncate(folder / file, keep if keep >= 0 else size + keep)
    check_refused(folder, meta_skeleton(), ValueError, f"{file} is truncated or not a safetensors file")


@pytest.mark.parametrize("file", ["model.safetensors", "buffers.safetensors"])
def test_a_flipped_bit_is_noticed(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[-10] ^= 16
    (folder / file).write_bytes(data)
    check_refused(folder, meta_skeleton(), ValueError, "is damaged: its checksum")


@pytest.mark.parametrize("text", ["", "{", "not json", "\0\0", "[" * 100_000])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "octavo.json").write_text(text)
    check_refused(folder, meta_skeleton(), ValueError, "octavo.json is not JSON")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="other"), "is not a file written by octavo.save"),
        (
            lambda c: c.update(format_version=2, octavo_version="9.9"),
            "version 2, written by octavo 9.9.*upgrade",
        ),
        (lambda c: c.update(format_version="1"), "format version 1"),
        (lambda c: c.update(format_version=0), "format version 0"),
        (lambda c: c.pop("layers"), "has no 'layers'"),
        (lambda c: c.pop("aliases"), "has no 'aliases'"),
        (lambda c: c["layers"].update({"body.0": {"name": "Int3"}}), "Int3"),
        (lambda c: c["layers"].update({"body.0": 7}), "body.0"),
        (
            lambda c: c["layers"].update({"body.9": c["layers"]["body.0"]}),
            "layer 'body.9' is missing in skeleton",
        ),
        (
            lambda c: c["layers"].update({"body.1": c["layers"]["body.0"]}),
            "layer 'body.1' is a ReLU in skeleton",
        ),
        (lambda c: c["layers"].pop("body.0"), "unexpected tensors: body.0.weight_scale"),
        (lambda c: c["aliases"].update({"head.weight": "nothing"}), "names 'nothing'"),
        (lambda c: c["aliases"].clear(), "lacks tensors: head.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, change, message):
    edit_config(folder, change)
    check_refused(folder, meta_skeleton(), ValueError, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("body.0.weight"), "lacks tensors: body.0.weight"),
        (lambda t: t.pop("body.3.running_mean"), "lacks tensors: body.3.running_mean"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"body.0.weight": torch.zeros(35, 22, dtype=torch.int8)}),
            r"\(35, 22\) in the checkpoint",
        ),
        (
            lambda t: t.update({"body.0.weight": torch.zeros(35, 21)}),
            "torch.float32 in the checkpoint, torch.int8",
        ),
        (
            lambda t: t.update({"body.0.weight_scale": torch.ones(35)}),
            r"\(35,\) in the checkpoint and \(35, 1\)",
        ),
        (
            lambda t: t.update({"body.0.weight_scale": torch.ones(35, 1).half()}),
            "torch.float16 in the checkpoint",
        ),
        (
            lambda t: t.update({"embed.weight": torch.zeros(11, 21, dtype=torch.int8)}),
            "torch.int8 in the checkpoint",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, message):
    edit_tensors(folder, change)
    check_refused(folder, meta_skeleton(), ValueError, message)


def test_another_skeleton_is_refused(folder):
    check_refused(
        folder, nn.Sequential(nn.Linear(21, 35)), ValueError, "layer 'body.0' is missing in skeleton"
    )
    check_refused(
        folder, quantized_model(), ValueError, "'body.0' is a QuantLinear in skeleton.*the float model"
    )


# --- the checksum of octavo.json, and files that belong together ----------------------------------------------------


def damage_text(folder, old, new):
    text = (folder / "octavo.json").read_text()
    assert old in text
    (folder / "octavo.json").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "old, new",
    [
        ('"symmetric": true', '"symmetric": false'),
        ('"Int8Dynamic"', '"Int8WeightOnly"'),
        ('"Int8"', '"CoarseInt8"'),
        ('"name": "Int8",', ""),
        ('"head.weight": "embed.weight"', ""),
        ('"crc32": "', '"crc32": "0'),
    ],
)
def test_no_changed_word_of_the_config_is_believed(folder, old, new):
    damage_text(folder, old, new)
    check_refused(folder, meta_skeleton(), ValueError, "octavo.json is damaged or was edited: its checksum")
    with pytest.raises(ValueError, match="octavo.json is damaged or was edited"):
        octavo.inspect_checkpoint(folder)


def test_the_config_may_be_laid_out_anew(folder):
    config = json.loads((folder / "octavo.json").read_text())
    (folder / "octavo.json").write_text(json.dumps(dict(reversed(config.items()))))
    octavo.load(folder, meta_skeleton())


@pytest.mark.parametrize("file", ["model.safetensors", "buffers.safetensors", "octavo.json"])
def test_files_of_two_checkpoints_are_refused(folder, tmp_path_factory, file):
    other = tmp_path_factory.mktemp("other")
    model = quantized_model(octavo.Int8Dynamic(symmetric=False))
    model.offset += 1
    model.embed.weight.data += 1
    octavo.save(model, other)
    (folder / file).write_bytes((other / file).read_bytes())
    check_refused(folder, meta_skeleton(), ValueError, "was not written together with octavo.json")


# --- values that no layer can have ----------------------------------------------------------------------------------

BAD_SCALES = [math.nan, math.inf, -math.inf, 0.0, -0.5]


def one_layer(scheme):
    torch.manual_seed(0)
    return octavo.quantized(nn.Sequential(nn.Linear(8, 4)), scheme, data=[torch.randn(16, 8)])


@pytest.mark.parametrize(
    "scheme, tensor, value",
    [
        *((octavo.Int8Dynamic(), "0.weight_scale", value) for value in BAD_SCALES),
        *((octavo.Int8Static(), "0.input_scale", value) for value in BAD_SCALES),
        *(
            (octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=False)), "0.input_multiplier", value)
            for value in BAD_SCALES
        ),
        (octavo.Int8Dynamic(), "0.bias", math.nan),
        (octavo.LLMInt8(threshold=0.5), "0.outlier_weight", math.nan),
        (octavo.LLMInt8(threshold=0.5), "0.outlier_columns", 8),
        (octavo.LLMInt8(threshold=0.5), "0.outlier_columns", -1),
    ],
    ids=str,
)
def test_values_that_no_layer_can_have_are_neither_loaded_nor_saved(tmp_path, scheme, tensor, value):
    def put(tensors):
        tensors[tensor].view(-1)[-1] = value

    octavo.save(one_layer(scheme), tmp_path)
    edit_tensors(tmp_path, put)
    check_refused(tmp_path, nn.Sequential(nn.Linear(8, 4)), ValueError, f"load: {tensor} holds")
    model = one_layer(scheme)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    put(state)
    with pytest.raises(RuntimeError, match=f"{tensor} holds"):
        model.load_state_dict(state)
    put(
        dict(model.state_dict(keep_vars=True))
        if tensor.endswith("columns")
        else {tensor: model.get_parameter(tensor).data}
    )
    with pytest.raises(ValueError, match=f"save: {tensor} holds"):
        octavo.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_infinite_bias_is_a_mask_and_stays(tmp_path):
    linear = nn.Linear(8, 4)
    linear.bias.data[1] = -math.inf
    octavo.save(octavo.quantized(linear, octavo.Int8Dynamic()), tmp_path)
    assert octavo.load(tmp_path, nn.Linear(8, 4)).bias[1] == -math.inf


# --- files that are none --------------------------------------------------------------------------------------------


def readers(folder):
    with pytest.raises(ValueError) as loading:
        octavo.load(folder, meta_skeleton())
    with pytest.raises(ValueError) as inspecting:
        octavo.inspect_checkpoint(folder)
    return str(loading.value), str(inspecting.value)


@pytest.mark.parametrize("file", ["octavo.json", "model.safetensors", "buffers.safetensors"])
@pytest.mark.parametrize("kind", NOT_TO_BE_READ)
def test_what_is_no_regular_file_is_refused_by_every_reader(folder, file, kind):
    make, message = NOT_TO_BE_READ[kind]
    (folder / file).unlink()
    make(folder / file)
    for error in readers(folder):
        assert re.search(f"{file} {message}", error)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", NOT_TO_BE_READ)
def test_so_it_is_in_folders_of_transformers(tmp_path, file, kind):
    make, message = NOT_TO_BE_READ[kind]
    (tmp_path / "config.json").write_text('{"quantization_config": {"octavo": {"layers": {}}}}')
    if file == "config.json":
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / file).unlink(missing_ok=True)
    make(tmp_path / file)
    for error in readers(tmp_path):
        assert re.search(f"{file} {message}", error)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "/etc/x.safetensors", "a/b.safetensors", 3, None, ["a"]]
)
def test_an_index_leads_nowhere_else(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"octavo": {"layers": {}}}}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for error in readers(folder):
        assert "only safetensors files of the same folder are read" in error


def test_a_cache_of_the_hub_is_read_through_its_links(folder):
    for path in list(folder.iterdir()):
        blob = folder.parent / f"blob-{path.name}"
        path.rename(blob)
        path.symlink_to(f"../{blob.name}")
    assert octavo.inspect_checkpoint(folder).quantized
    octavo.load(folder, meta_skeleton())


# --- folders that transformers opens for us -------------------------------------------------------------------------


def test_transformers_is_not_sent_to_other_files(tmp_path):
    tiny_models = pytest.importorskip("tiny_models")
    from octavo.huggingface import models as pretrained

    tiny_models.bert().save_pretrained(tmp_path / "float")
    pretrained.load_model(tmp_path / "float")
    (tmp_path / "float" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "float" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="only safetensors files of the same folder are read"):
        pretrained.load_model(tmp_path / "float")
    index.unlink()
    (tmp_path / "float" / "model.safetensors").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match="model.safetensors is a Git LFS pointer"):
        pretrained.load_model(tmp_path / "float")
    os.mkfifo(tmp_path / "float" / "generation_config.json")
    for read in (
        pretrained.load_model,
        pretrained.load_tokenizer,
        pretrained.load_encoder,
    ):
        with pytest.raises(ValueError, match=r"generation_config.json is a named pipe"):
            read(tmp_path / "float")
