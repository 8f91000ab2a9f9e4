# SPDX-License-Identifier: Apache-2.0
"""Adapters on a whole model: which layers get them, which of them count, and that taking them off leaves no trace."""

import pytest
import torch
from adapted import ADAPTERS, SCHEMES, Network, inputs, quantized_network, train_a_little_
from models import IDS, LINEARS
from models import model as float_model
from torch import nn

import octavo
from octavo.nn import QuantLinear
from octavo.nn.adapters import AdaptedLinear


def small_model():
    model = float_model()
    octavo.quantize_(model, octavo.Int4WeightOnly(group_size=16), exclude="head")
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_taking_adapters_off_leaves_the_very_layers(adapter):
    model = quantized_network()
    model.fc1.bias.requires_grad_(True)
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expected = model(inputs())
    octavo.adapt_(model, ADAPTERS[adapter], "first")
    octavo.adapt_(model, octavo.LoRA(r=1), "second")
    train_a_little_(model)
    assert not torch.equal(model(inputs()), expected)
    octavo.remove_adapters_(model, "second")
    octavo.remove_adapters_(model)
    assert dict(model.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.state_dict(keep_vars=True).keys() == state.keys()
    assert torch.equal(model(inputs()), expected)
    assert not any(name.startswith("_trainable") for name in vars(model))


def test_targets_are_quantized_layers_unless_named():
    model = small_model()
    report = octavo.adapt_(model, octavo.LoRA(r=2))
    assert [row.name for row in report.adapted] == [name for name in LINEARS if name != "head"]
    assert {row.name: row.detail for row in report.rows if row.action == "kept"} == {
        "head": "float, and no target"
    }
    assert report.parameters == sum(parameter.numel() for parameter in octavo.adapters(model))
    assert "7" in str(report) and "LoRA(2)" in str(report) and "head" in report._repr_html_()

    model = small_model()
    report = octavo.adapt_(model, octavo.LoRA(r=2, targets=["*.mlp.?", "re:head"], ranks={"head": 5}))
    assert [row.name for row in report.adapted] == [*(n for n in LINEARS if "mlp" in n), "head"]
    assert model.head.adapters.default.r == 5 and isinstance(model.head.base, nn.Linear)
    assert report.rows[-1].detail == "LoRA r=5"


def test_everything_else_is_frozen():
    model = small_model()
    octavo.adapt_(model, octavo.LoRA(r=2))
    trained = {id(parameter) for parameter in octavo.adapters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    octavo.remove_adapters_(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["embedding.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_training_lowers_the_loss_and_moves_nothing_else():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    octavo.adapt_(model, octavo.LoRA(r=4))
    optimizer = torch.optim.Adam(octavo.adapters(model), lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    octavo.remove_adapters_(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_adapters_are_switched_weighted_and_disabled():
    model = quantized_network()
    x = inputs()
    outputs = {None: model(x)}
    for seed, name in enumerate(("a", "b")):
        octavo.adapt_(model, octavo.LoRA(r=2), name)
        with torch.no_grad():
            for parameter in octavo.adapters(model, name):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        outputs[name] = model(x)
    assert not torch.equal(outputs["a"], outputs["b"])
    with octavo.use_adapters(model, "a"):
        assert torch.equal(model(x), outputs["a"])
        with octavo.use_adapters(model, None):
            assert torch.equal(model(x), outputs[None])
        assert torch.equal(model(x), outputs["a"])
    assert torch.equal(model(x), outputs["b"])
    octavo.use_adapters(model, {"a": 0.0})
    assert torch.equal(model(x), outputs[None])
    octavo.use_adapters(model, {"a": 0.5, "b": -2.0})
    layer, h = model.fc1, torch.randn(3, 48)
    a, b = layer.adapters.a, layer.adapters.b
    expected = layer.base(h) + 0.5 * a.product(h) - 2.0 * b.product(h)
    assert torch.allclose(layer(h), expected, rtol=1e-5, atol=1e-5)
    assert len(octavo.adapters(model)) == len(octavo.adapters(model, "a")) + len(octavo.adapters(model, "b"))


def test_half_of_ia3_is_halfway_to_its_factors():
    model = quantized_network()
    octavo.adapt_(model, octavo.IA3(targets="fc2"))
    train_a_little_(model)
    x, factors = inputs(), model.fc2.adapters.default.factors.detach().flatten()
    base = quantized_network()(x)
    octavo.use_adapters(model, {"default": 0.5})
    assert torch.equal(model(x), base * (1 + 0.5 * (factors - 1)))


def test_one_layer_in_two_places_has_one_adapter():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    octavo.quantize_(model, octavo.Int8Dynamic())
    report = octavo.adapt_(model, octavo.LoRA(r=2))
    assert len(report.rows) == 1 and model[0] is model[2] and isinstance(model[0], AdaptedLinear)
    octavo.remove_adapters_(model)
    assert model[0] is model[2] and isinstance(model[0], QuantLinear)


class Refused(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize(
    ("model", "arguments", "error", "words"),
    [
        (Network, (octavo.LoRA(),), ValueError, "no quantized layers"),
        (quantized_network, (octavo.LoRA(targets="fc3"),), ValueError, "closest name"),
        (quantized_network, ("lora",), TypeError, "octavo.LoRA"),
        (quantized_network, (octavo.LoRA(), "a.b"), ValueError, "name of an adapter"),
        (quantized_network, (octavo.LoRA(), "keys"), ValueError, "name of an adapter"),
        (quantized_network, (octavo.LoRA(), 3), TypeError, "string"),
        (lambda: quantized_network().fc1, (octavo.LoRA(),), ValueError, "Sequential"),
        (lambda: 3, (octavo.LoRA(),), TypeError, "Module"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_left_alone(model, arguments, error, words):
    model = model()
    before = repr(model)
    with pytest.raises(error, match=words):
        octavo.adapt_(model, *arguments)
    assert repr(model) == before


def test_prepared_layers_and_taken_names_are_refused():
    prepared = Network()
    octavo.prepare_(prepared, octavo.Int8Dynamic())
    with pytest.raises(ValueError, match="freeze_"):
        octavo.adapt_(prepared, octavo.LoRA(targets="*"))
    model = quantized_network()
    octavo.adapt_(model, octavo.LoRA())
    with pytest.raises(ValueError, match="already"):
        octavo.adapt_(model, octavo.IA3())
    for call in (octavo.use_adapters, octavo.adapters, octavo.remove_adapters_):
        with pytest.raises(ValueError, match="it has 'default'"):
            call(model, "other")
    with pytest.raises(ValueError, match="no adapter counts"):
        octavo.adapters(quantized_network())
    with pytest.raises(TypeError, match="strength"):
        octavo.use_adapters(model, {"default": "much"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: octavo.LoRA(r=0),
        lambda: octavo.LoRA(r=2.0),
        lambda: octavo.LoRA(dropout=1.0),
        lambda: octavo.LoRA(bias="some"),
        lambda: octavo.LoRA(start="pissa"),
        lambda: octavo.LoRA(ranks={"fc1": 0}),
        lambda: octavo.LoRA(ranks=3),
        lambda: octavo.LoRA(dora=True, output_bias=True),
        lambda: octavo.LoRA(targets="re:("),
        lambda: octavo.AdaLoRA(),
        lambda: octavo.AdaLoRA(init_r=8, target_r=8, total_step=10),
        lambda: octavo.AdaLoRA(total_step=10, warm_up=5, final=5),
        lambda: octavo.AdaLoRA(total_step=10, beta1=0.0),
        lambda: octavo.IA3(feedforward=[3]),
    ],
)
def test_adapters_that_cannot_be_are_refused(make):
    with pytest.raises((TypeError, ValueError)):
        make()


def test_adapters_go_to_json_and_back():
    from octavo.base.configs import from_dict
    from octavo.nn.adapters import Adapter

    for adapter in (*ADAPTERS.values(), octavo.LoRA(ranks={"fc1": 3}, targets=["fc1", "*"])):
        fields = adapter.to_dict()
        assert from_dict("adapter", Adapter, fields) == adapter


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapted_model_is_not_saved_as_if_it_had_none(scheme, tmp_path):
    model = quantized_network(SCHEMES[scheme])
    octavo.adapt_(model, octavo.LoRA(r=1))
    with pytest.raises(ValueError, match="save_adapter"):
        octavo.save(model, tmp_path / "model")
    octavo.remove_adapters_(model)
    octavo.save(model, tmp_path / "model")
