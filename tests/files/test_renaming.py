# SPDX-License-Identifier: Apache-2.0
"""Files of transformers whose names or forms are not those of the model are read as transformers reads them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert, check_equal_states, llava, mixtral, transformers
from torch import nn

import octavo
from octavo.conversion.folder import quantize_folder
from octavo.files.renaming import Conversions, own_names
from octavo.huggingface import models as pretrained


@pytest.mark.parametrize("make", [mixtral, llava])
def test_a_model_that_its_own_save_pretrained_wrote_is_read(tmp_path, make):
    model = make()
    octavo.quantize_(model, octavo.Int8Dynamic())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() != model.state_dict().keys()
    check_equal_states(pretrained.load_quantized(tmp_path), model)


def test_a_base_model_gets_its_experts_from_the_whole_one(tmp_path):
    model = mixtral()
    octavo.quantize_(model, octavo.Int8Dynamic())
    model.save_pretrained(tmp_path)
    skeleton = transformers.MixtralModel(model.config)
    check_equal_states(octavo.load(tmp_path, skeleton), model.model)


def test_experts_that_another_program_quantized_are_refused(tmp_path):
    """Here they are one tensor, and no linear layers."""
    mixtral().save_pretrained(tmp_path / "float")
    quantize_folder(tmp_path / "float", tmp_path / "int8", octavo.Int8Dynamic())
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].to(torch.int8)
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]), 1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="experts.*torch.int8 in the checkpoint, torch.float32"):
        pretrained.load_quantized(tmp_path / "int8")


def test_names_of_norms_in_old_checkpoints_are_known():
    old = "bert.embeddings.LayerNorm.gamma"
    assert own_names(bert(), [old]) == {old: "bert.embeddings.LayerNorm.weight"}


def test_other_modules_keep_their_names_and_forms():
    conversions = Conversions(nn.Sequential(nn.Linear(2, 2)))
    assert conversions.renamed("0.weight") == "0.weight" and conversions.converted({}) == {}


class Stand(dict):
    """What a conversion gives, whatever it is."""

    def convert(self, name, model, config):
        return self["gives"](name)


@pytest.mark.parametrize(
    "form",
    [
        lambda name: {name: torch.ones(2)},
        lambda name: {name: [torch.ones(2)]},
        lambda name: ({name: torch.ones(2)}, None),  # transformers 5.0.0
        lambda name: ({name: [torch.ones(2)]}, {}),
    ],
)
def test_the_forms_in_which_versions_of_transformers_give_tensors_are_known(form):
    assert torch.equal(Conversions(mixtral())._convert("x", Stand(gives=form))["x"], torch.ones(2))


@pytest.mark.parametrize(
    "form",
    [
        lambda name: None,
        lambda name: {},
        lambda name: (),
        lambda name: (None, "error"),
        lambda name: {name: [torch.ones(2), torch.ones(2)]},
        lambda name: {name: "text"},
        lambda name: {}["missing"],
    ],
)
def test_a_conversion_that_octavo_does_not_know_is_refused_with_the_version(form):
    with pytest.raises(ValueError, match="'x'") as raised:
        Conversions(mixtral())._convert("x", Stand(gives=form))
    assert f"transformers {transformers.__version__}" in str(raised.value)


def test_a_kind_of_change_that_octavo_does_not_know_is_refused(monkeypatch):
    from transformers import conversion_mapping

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: ["rotate"])
    with pytest.raises(
        ValueError, match="changes files of BertForMaskedLM by a str, which octavo does not know"
    ):
        Conversions(bert())
