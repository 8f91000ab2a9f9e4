# SPDX-License-Identifier: Apache-2.0
"""Folders that PEFT wrote are read and written again; the outputs are PEFT's."""

import json
import shutil

import pytest
import torch
from adapted import (
    ADAPTERS,
    CASES,
    PEFT,
    SCHEMES,
    inputs,
    peft_base,
    peft_outputs,
    quantized_network,
    train_a_little_,
)
from safetensors.torch import load_file, save_file

import octavo


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_outputs_of_peft(case):
    """Outputs are sums of at most 24 products and a few more operations in float32, in another order."""
    model, outputs = peft_base(), peft_outputs()
    octavo.load_adapter(model, PEFT / case)
    y, expected = model(outputs["x"]), outputs[f"{case}/y"]
    largest = max(expected.abs().max(), model.fc2.base.weight.abs().sum(1).max())
    assert (y - expected).abs().max() <= 2 * 40 * 2.0**-24 * largest
    octavo.remove_adapters_(model)
    assert torch.equal(model(outputs["x"]), peft_base()(outputs["x"]))


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_as_it_was(case, tmp_path):
    model = peft_base()
    octavo.load_adapter(model, PEFT / case, "other")
    octavo.save_adapter(model, tmp_path, "other")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, PEFT / case))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    fields, others = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, PEFT / case)
    )
    patterns = (
        {"rank_pattern", "alpha_pattern"} if case == "lora_pattern" else set()
    )  # ours name one layer exactly
    assert {name: fields[name] for name in fields.keys() - patterns} == {
        name: others[name] for name in fields.keys() - patterns
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_saved_adapter_has_the_same_bits_on_the_same_base(scheme, adapter, tmp_path):
    model = quantized_network(SCHEMES[scheme])
    octavo.adapt_(model, ADAPTERS[adapter], "mine")
    train_a_little_(model)
    octavo.save_adapter(model, tmp_path / "adapter", "mine")
    other = quantized_network(SCHEMES[scheme])
    octavo.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(inputs()), model(inputs()))


def test_the_layers_that_are_named_are_the_ones_that_peft_finds(tmp_path):
    """PEFT takes endings of names: "1" is "0.1" as well, so there a regular expression is written."""
    import re

    layers = [torch.nn.Linear(32, 32) for _ in range(4)]
    model = torch.nn.Sequential(torch.nn.Sequential(*layers[:2]), *layers[2:])
    octavo.quantize_(model, octavo.Int8Dynamic())
    names = ["0.0", "0.1", "1", "2"]
    for targets in (["1"], ["0.0"], ["0.1", "1"], names):
        octavo.adapt_(model, octavo.LoRA(targets=targets))
        octavo.save_adapter(model, tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        if isinstance(written, str):
            found = [name for name in names if re.fullmatch(written, name)]
        else:
            found = [
                name for name in names if any(name == each or name.endswith(f".{each}") for each in written)
            ]
        assert found == targets
        octavo.remove_adapters_(model)


def edited(tmp_path, case, fields=None, tensors=None, drop=()):
    folder = tmp_path / "edited"
    shutil.copytree(PEFT / case, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {name: value for name, value in (config | (fields or {})).items() if name not in drop}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    found = load_file(file) | (tensors or {})
    save_file({name: value for name, value in found.items() if value is not None}, file)
    return folder


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("lora", {"fields": {"peft_type": "LOHA"}}, "LOHA"),
        ("lora", {"fields": {"use_qalora": True}}, "use_qalora"),
        ("lora", {"fields": {"modules_to_save": ["fc1"]}}, "modules_to_save"),
        ("lora", {"fields": {"r": -1}}, "at least 1"),
        ("adalora", {"drop": ("init_r",)}, "init_r"),
        ("adalora", {"fields": {"rank_pattern": {"fc1.lora_E": [True, False]}}}, "two adapters"),
        ("lora", {"tensors": {"base_model.model.fc1.lora_B.weight": None}}, "has no lora_B.weight"),
        ("lora", {"tensors": {"base_model.model.fc1.lora_B.weight": torch.zeros(23, 4)}}, "shape"),
        ("lora", {"tensors": {"base_model.model.fc1.lora_B.weight": torch.full((24, 4), torch.nan)}}, "NaN"),
        ("lora", {"tensors": {"base_model.model.fc1.lora_B.bias": torch.zeros(24)}}, "does not speak of"),
        ("lora", {"tensors": {"base_model.model.fc9.lora_A.weight": torch.zeros(4, 16)}}, "fc9"),
        ("lora", {"tensors": {"base_model.model.fc1.lora_embedding_A": torch.zeros(4, 16)}}, "embeddings"),
    ],
)
def test_what_cannot_be_computed_or_is_damaged_is_refused(case, change, words, tmp_path):
    model = peft_base()
    before = repr(model)
    with pytest.raises(ValueError, match=words):
        octavo.load_adapter(model, edited(tmp_path, case, **change))
    assert repr(model) == before and all(parameter.requires_grad for parameter in model.parameters())


def test_missing_folders_and_adapters(tmp_path):
    model = peft_base()
    with pytest.raises(FileNotFoundError):
        octavo.load_adapter(model, tmp_path / "nothing")
    with pytest.raises(ValueError, match="it has none"):
        octavo.save_adapter(model, tmp_path)
    with pytest.raises(TypeError):
        octavo.load_adapter(model, 3)
