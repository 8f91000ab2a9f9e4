# SPDX-License-Identifier: Apache-2.0
"""Every model of transformers says of itself what it is, whoever shares its config and whichever part was quantized."""

import pytest
import torch
from tiny_models import bert, check_equal_states, llama, llava, transformers

import octavo


def test_models_that_share_a_config_are_not_told(tmp_path):
    """Neither by quantizing nor by loading: what is still float is saved and read as float."""
    first = llama()
    second, third = transformers.LlamaForCausalLM(first.config), transformers.LlamaForCausalLM(first.config)
    octavo.quantize_(first, octavo.Int8Dynamic())
    octavo.save(first, tmp_path / "ours")
    third = octavo.load(tmp_path / "ours", third)
    assert not hasattr(second.config, "quantization_config")
    second.save_pretrained(tmp_path / "float")
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float")
    check_equal_states(read, second)
    for number, model in enumerate((first, third)):
        model.save_pretrained(tmp_path / str(number))
        check_equal_states(octavo.load(tmp_path / str(number)), model)


def test_modules_of_one_model_share_its_config_as_before():
    """Among them the inner models' configs, which are parts of the outer one's."""

    def holders(model):
        """{module: modules whose config is the same object}, by names"""
        configs = {
            name: id(module.config) for name, module in model.named_modules() if hasattr(module, "config")
        }
        return {name: [other for other in configs if configs[other] == configs[name]] for name in configs}

    model = llava()
    before, old = holders(model), model.config
    octavo.quantize_(model, octavo.Int8Dynamic())
    assert holders(model) == before and model.config is not old
    assert model.config.text_config is model.model.language_model.config
    model.set_attn_implementation("eager")
    attention = model.model.language_model.layers[0].self_attn
    assert attention.config._attn_implementation == "eager" != old.text_config._attn_implementation
    for config in (old, old.text_config, old.vision_config):
        assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("part", ["model", "model.layers.1", "model.layers.0.mlp"])
def test_a_model_of_which_a_part_is_quantized_is_saved_as_what_it_is(tmp_path, part):
    model = llama()
    other = transformers.LlamaForCausalLM(model.config)
    octavo.quantize_(model.get_submodule(part), octavo.Int8Dynamic())
    model.save_pretrained(tmp_path)
    check_equal_states(octavo.load(tmp_path), model)
    assert not hasattr(other.config, "quantization_config")


@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(), octavo.LLMInt8()], ids=lambda scheme: scheme.name)
def test_a_base_model_saved_without_its_head_is_read(tmp_path, scheme):
    """Its config, which is the whole model's, names layers as they are called there: `ignore`, groups, all of them."""
    for make in (llama, lambda: bert(transformers.BertForSequenceClassification)):
        model = make()
        octavo.quantize_(model, scheme, exclude="*.0.*", data=torch.arange(24).reshape(2, 12))
        model.base_model.save_pretrained(tmp_path)
        check_equal_states(octavo.load(tmp_path), model.base_model)
