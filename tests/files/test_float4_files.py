# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 in the layouts that compressed-tensors has for them: written, read, refused."""

import json
from pathlib import Path

import pytest
import torch
from asserts import assert_bits_equal
from safetensors.torch import save_file
from torch import nn

import octavo
from octavo.files.compressed_tensors import quantization_config

X = torch.linspace(-2, 2, 3 * 64).reshape(3, 64).sin()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5, bias=False))


def folder(path: Path, m: nn.Module, entry: dict) -> Path:
    (path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file({name: tensor.clone() for name, tensor in m.state_dict().items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("scheme", [octavo.MXFP4, octavo.NVFP4])
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_a_folder_of_their_layout_brings_back_the_same_bits(tmp_path, scheme, activations):
    scheme = scheme(activations=activations)
    m = octavo.quantized(model(), scheme)
    entry = quantization_config(m)
    (group,) = entry["config_groups"].values()
    assert entry["format"] == f"{scheme.name.lower()}-pack-quantized" and entry["quant_method"]
    assert group["weights"]["type"] == "float" and group["weights"]["group_size"] in (16, 32)
    assert (group["input_activations"] is None) == (activations == "int16")
    loaded = octavo.load(folder(tmp_path, m, entry), model())
    assert loaded[0].scheme == scheme
    assert_bits_equal(loaded(X), m(X))


def test_what_their_files_say_without_scale_dtypes_is_read_and_other_activations_are_refused(tmp_path):
    m = octavo.quantized(model(), octavo.NVFP4(activations="int16"))
    entry = quantization_config(m)
    (group,) = entry["config_groups"].values()
    group["weights"] = {key: value for key, value in group["weights"].items() if not key.endswith("_dtype")}
    assert_bits_equal(octavo.load(folder(tmp_path, m, entry), model())(X), m(X))
    group["input_activations"] = {**group["weights"], "dynamic": "local"}
    with pytest.raises(ValueError, match="input_activations .* are not read"):
        octavo.load(folder(tmp_path, m, entry), model())
    group["weights"]["group_size"] = 32
    with pytest.raises(ValueError, match="weights .* are not read as nvfp4-pack-quantized"):
        octavo.load(folder(tmp_path, m, entry), model())


def test_formats_without_words_are_not_passed_off_as_theirs():
    for scheme in (octavo.NF4(), octavo.FP4()):
        assert "quant_method" not in quantization_config(octavo.quantized(model(), scheme))
