# SPDX-License-Identifier: Apache-2.0
"""PEFT's own models on quantized layers: they train, save, load, merge, and agree with octavo's adapters."""

import copy

import pytest
import torch
from adapted import inputs, quantized_network

import octavo

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"target_modules": ["fc1", "fc2"]}


def configs():
    return {
        "lora": peft.LoraConfig(r=3, lora_alpha=6, **TARGETS),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **TARGETS),
        "ia3": peft.IA3Config(feedforward_modules=["fc2"], **TARGETS),
    }


def integration():
    from octavo.integrations import peft as module

    return module


def trained(kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(quantized_network(), integration().configured(configs()[kind]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(inputs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "adalora", "ia3"])
def test_a_trained_model_is_saved_and_read_by_both(kind, tmp_path):
    """By PEFT the same bits; by octavo the same operations but for the order of a few factors."""
    model = trained(kind)
    expected = model(inputs())
    model.save_pretrained(tmp_path)
    theirs = integration().load(quantized_network(), tmp_path)
    assert torch.equal(theirs(inputs()), expected)
    ours = quantized_network()
    octavo.load_adapter(ours, tmp_path)
    assert (ours(inputs()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), quantized_network()(inputs()))


def test_what_octavo_has_trained_is_read_by_peft(tmp_path):
    ours = quantized_network()
    octavo.adapt_(ours, octavo.LoRA(r=2))
    with torch.no_grad():
        for parameter in octavo.adapters(ours):
            parameter.normal_(std=0.1)
    octavo.save_adapter(ours, tmp_path)
    theirs = integration().load(quantized_network(), tmp_path)
    expected = ours(inputs())
    assert (theirs(inputs()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_merging_requantizes_and_unmerging_gives_the_layer_back():
    model = trained("lora")
    layer = model.base_model.model.fc1
    base, x = layer.base_layer, inputs()
    before = model(x)
    model.merge_adapter()
    weights = base.scheme.weights
    weight = base.dequantize() + layer.get_delta_weight("default")
    nearest = weights.stored_qparams(weights.qparams(weight)).quantize(weight).dequantize()
    assert torch.equal(layer.base_layer.dequantize(), nearest.detach())
    model.unmerge_adapter()
    assert layer.base_layer is base and torch.equal(model(x), before)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.fc1) is type(base)


def test_all_linear_and_refusals():
    configured = integration().configured
    model = quantized_network()
    config = configured(peft.LoraConfig(target_modules="all-linear"), model)
    assert config.target_modules == {"fc1", "fc2"}
    with pytest.raises(ValueError, match="needs the model"):
        configured(peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="dora=True"):
        configured(peft.LoraConfig(use_dora=True, **TARGETS))
    for start in ("pissa", "olora"):
        with pytest.raises(ValueError, match=start):
            configured(peft.LoraConfig(init_lora_weights=start, **TARGETS))
    with pytest.raises(TypeError, match="served"):
        configured(peft.LoHaConfig(**TARGETS))
    ia3 = peft.get_peft_model(model, configured(configs()["ia3"]))
    with pytest.raises(NotImplementedError, match="octavo.merge_"):
        ia3.merge_adapter()
