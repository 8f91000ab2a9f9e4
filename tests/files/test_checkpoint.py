# SPDX-License-Identifier: Apache-2.0
"""save and load: equal bits after a round trip, no float copy on the way, no harm done by bad files."""

import json
import os

import pytest
import torch
from checkpoints import IDS, Model, check_refused, edit_config, edit_tensors, meta_skeleton, quantized_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo.nn import QuantLinear

SCHEMES = [octavo.Int8Dynamic(), octavo.Int8Dynamic(symmetric=False), octavo.Int8WeightOnly()]


@pytest.fixture
def folder(tmp_path):
    octavo.save(quantized_model(), tmp_path)
    return tmp_path


def test_a_loaded_model_is_packed_so_that_requires_grad_may_be_set_on_all_of_it(folder):
    model = octavo.load(folder, meta_skeleton())
    assert model.body[0].is_packed and model.body[2].is_packed
    model.requires_grad_(True)  # raises for an int8 Parameter


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("skeleton", [meta_skeleton, lambda: Model().eval()], ids=["meta", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_round_trip_gives_equal_bits(tmp_path, scheme, skeleton, packed):
    model = quantized_model(scheme)
    if packed:
        model(IDS)
    octavo.save(model, tmp_path / "new" / "folder")
    given = skeleton()
    loaded = octavo.load(tmp_path / "new" / "folder", given)
    assert loaded is given
    assert loaded.body[0].scheme == scheme and isinstance(loaded.head, nn.Linear)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert torch.equal(loaded(IDS), model(IDS))


def test_files_hold_codes_and_scales_under_the_names_of_compressed_tensors(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()
        }
    assert found["body.0.weight"] == ("I8", [35, 21])
    assert found["body.0.weight_scale"] == ("F32", [35, 1])
    assert found["body.0.bias"] == ("F32", [35])
    assert not [name for name in found if "packed" in name or "column_sum" in name or name == "offset"]
    config = json.loads((folder / "octavo.json").read_text())
    assert config["format"] == "octavo" and config["format_version"] == 1
    assert config["octavo_version"] == octavo.__version__
    assert config["layers"]["body.2"] == {
        "name": "Int8Dynamic",
        "weights": {"name": "Int8", "bits": 8},
        "method": {"name": "RoundToNearest"},
        "symmetric": True,
        **{"group_size": None, "activation_group_size": None, "bits": 8},
    }


def test_tied_weights_are_written_once_and_stay_tied(folder):
    config = json.loads((folder / "octavo.json").read_text())
    assert config["aliases"] == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(folder / "model.safetensors")
    loaded = octavo.load(folder, meta_skeleton())
    assert loaded.head.weight is loaded.embed.weight


def test_views_of_one_storage_are_written_out(tmp_path):
    model = nn.Module()
    model.register_buffer("whole", torch.arange(6.0))
    model.register_buffer("part", model.whole[2:4])
    model.register_buffer("columns", torch.arange(6.0).reshape(2, 3).t())  # not contiguous
    octavo.save(model, tmp_path)
    loaded = octavo.load(tmp_path, model)
    assert loaded.part.tolist() == [2, 3] and loaded.columns.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_linear_with_two_names_becomes_one_layer(tmp_path):
    def twice():
        linear = nn.Linear(8, 8)
        return nn.Sequential(linear, nn.ReLU(), linear)

    model = octavo.quantized(twice(), octavo.Int8Dynamic())
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = twice()
    loaded = octavo.load(tmp_path, skeleton)
    assert loaded[0] is loaded[2]
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))


def test_a_model_that_is_one_linear_comes_back_as_a_new_layer(tmp_path):
    linear = nn.Linear(8, 4)
    layer = octavo.quantized(linear, octavo.Int8WeightOnly())
    octavo.save(layer, tmp_path)
    loaded = octavo.load(tmp_path, nn.Linear(8, 4, device="meta"))
    x = torch.randn(3, 8)
    assert isinstance(loaded, QuantLinear) and torch.equal(loaded(x), layer(x))


def test_flags_of_the_skeleton_stay(folder):
    skeleton = meta_skeleton().train()
    skeleton.body[0].eval()
    skeleton.body[3].weight.requires_grad_(False)
    loaded = octavo.load(folder, skeleton)
    assert loaded.body[2].training and not loaded.body[0].training
    assert loaded.embed.weight.requires_grad and not loaded.body[3].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in loaded.body[0].parameters())


def test_the_float_dtype_of_the_file_wins(tmp_path):
    model = quantized_model().to(torch.bfloat16)
    octavo.save(model, tmp_path)
    loaded = octavo.load(tmp_path, meta_skeleton())
    assert loaded.embed.weight.dtype == loaded.body[0].bias.dtype == torch.bfloat16
    assert loaded.body[0].weight_scale.dtype == torch.float32


class LargestFloat(TorchDispatchMode):
    """Records the most elements that any floating-point tensor with memory had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_loading_into_a_meta_skeleton_never_makes_a_float_weight(tmp_path):
    octavo.save(octavo.quantized(nn.Sequential(nn.Linear(64, 96)), octavo.Int8Dynamic()), tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(64, 96))
    with LargestFloat() as largest:
        loaded = octavo.load(tmp_path, skeleton)
        loaded[0].pack_()
    assert largest.elements == 96  # the scales and the bias
    with LargestFloat() as largest:
        loaded[0].dequantize()
    assert largest.elements == 64 * 96  # the recorder would have seen it


def test_a_loaded_model_does_not_need_its_files(folder):
    loaded = octavo.load(folder, meta_skeleton())
    before = loaded(IDS)
    for name in os.listdir(folder):
        os.truncate(folder / name, 0)
    assert torch.equal(loaded(IDS), before)


def test_saving_over_a_checkpoint_replaces_it_whole(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert (folder / "buffers.safetensors").exists()
    small = octavo.quantized(nn.Sequential(nn.Linear(4, 4)), octavo.Int8Dynamic())
    octavo.save(small, folder)
    assert sorted(os.listdir(folder)) == ["model.safetensors", "octavo.json", "tokenizer.json"]
    octavo.load(folder, nn.Sequential(nn.Linear(4, 4)))


def test_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        octavo.save(quantized_model(), tmp_path)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in os.listdir(tmp_path)} == {0o644}


def test_a_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("octavo.files.safetensors.write", full_disk)
    files = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(OSError, match="No space"):
        octavo.save(nn.Sequential(nn.Linear(4, 4)), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_save_that_was_killed_while_its_files_moved_is_read_as_the_new_one(folder, monkeypatch, moved):
    """Whatever has its place already; the old one had buffers, the new one has none."""

    def killed(*_):
        raise KeyboardInterrupt

    model = octavo.quantized(nn.Sequential(nn.Linear(4, 4)), octavo.Int8Dynamic())
    replace = os.replace
    moves = iter([replace] * moved + [killed] * 3)
    monkeypatch.setattr(os, "replace", lambda *paths: next(moves)(*paths))
    monkeypatch.setattr("octavo.files.disk.shutil.rmtree", lambda *_, **__: None)
    if moved < 2:
        with pytest.raises(KeyboardInterrupt):
            octavo.save(model, folder)
    else:
        octavo.save(model, folder)
    monkeypatch.undo()
    loaded = octavo.load(folder, nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))
    assert [layer.name for layer in octavo.inspect_checkpoint(folder).layers] == ["0"]
    octavo.save(quantized_model(), folder)
    assert sorted(os.listdir(folder)) == ["buffers.safetensors", "model.safetensors", "octavo.json"]
    assert torch.equal(octavo.load(folder, meta_skeleton())(IDS), quantized_model()(IDS))


def test_a_folder_without_a_name_is_refused_and_the_current_one_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: octavo.save(quantized_model(), ""),
        lambda: octavo.load("", meta_skeleton()),
        lambda: octavo.inspect_checkpoint(""),
    ):
        with pytest.raises(ValueError, match="folder is ''; give a name, or '.' for the current folder"):
            call()
    assert os.listdir(tmp_path) == []
    octavo.save(quantized_model(), ".")
    assert "octavo.json" in os.listdir(tmp_path)


def test_a_failed_save_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("octavo.files.safetensors.write", full_disk)
    with pytest.raises(OSError, match="No space"):
        octavo.save(quantized_model(), tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []


def test_equal_models_give_equal_files(tmp_path):
    for name in ("a", "b"):
        octavo.save(quantized_model(), tmp_path / name)
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_checkpoint_of_before_there_were_checksums_is_read(folder):
    edit_tensors(folder, lambda t: None)  # safetensors' own function writes none
    edit_config(folder, lambda c: c.pop("prepared"))
    assert torch.equal(octavo.load(folder, meta_skeleton())(IDS), quantized_model()(IDS))


# Buffers that state_dict leaves out


def test_transient_buffers_fill_a_meta_skeleton_and_leave_a_real_one_alone(folder):
    assert torch.equal(octavo.load(folder, meta_skeleton()).offset, torch.arange(21.0))
    skeleton = Model()
    skeleton.offset += 1
    assert torch.equal(octavo.load(folder, skeleton).offset, torch.arange(21.0) + 1)


def test_a_transient_buffer_of_another_shape_is_refused(folder):
    edit_tensors(folder, lambda t: t.update(offset=torch.zeros(22)), "buffers.safetensors")
    check_refused(folder, meta_skeleton(), ValueError, r"buffer 'offset' has shape \(22,\)")


def test_a_tensor_left_on_meta_is_an_error_and_not_a_silence(folder):
    (folder / "buffers.safetensors").unlink()
    check_refused(folder, meta_skeleton(), ValueError, "'offset' of skeleton is on the meta device")
    skeleton = Model()
    skeleton.body.table = torch.zeros(3, device="meta")  # a plain attribute, which nothing could fill
    check_refused(folder, skeleton, ValueError, "'body.table' of skeleton is on the meta device")


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model is dict"):
        octavo.save({}, tmp_path)
    with pytest.raises(ValueError, match="'embed.weight' is on the meta device"):
        octavo.save(meta_skeleton(), tmp_path)

    class WithState(nn.Linear):
        def get_extra_state(self):
            return {"step": 1}

    with pytest.raises(ValueError, match="'_extra_state' in the state_dict is dict"):
        octavo.save(WithState(2, 2), tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError, match="skeleton is dict"):
        octavo.load(tmp_path, dict())
