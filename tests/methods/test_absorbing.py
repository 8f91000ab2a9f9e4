# SPDX-License-Identifier: Apache-2.0
"""Which layers may be changed, and that everybody who changes layers gives the same answer."""

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from torch import nn
from torch.nn.utils import parametrize, prune

import octavo
from octavo.methods.absorbing import is_norm_like, may_absorb, reason_to_stay

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 1, 20, 1, 1, 0.1, 1])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def own_forward(layer: nn.Module) -> None:
    original = layer.forward
    layer.forward = lambda x: original(x).tanh()


def loose_bias(layer: nn.Module) -> None:
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", bias)


CHANGED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "a parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "a hook": lambda layer: layer.register_forward_hook(lambda module, args, y: y.tanh()),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0].tanh(),)),
    "a forward on the instance": own_forward,
    "a bias that is a buffer": loose_bias,
}


def changed(*names: int):
    """A model for each kind of change, made to the layers `names`."""

    def make(kind: str) -> nn.Sequential:
        model = mlp()
        for name in names:
            CHANGED[kind](model[name])
        return model

    return make


@pytest.mark.parametrize("kind", CHANGED)
def test_a_changed_layer_absorbs_nothing_and_says_why(kind):
    (layer,) = changed(0)(kind)[:1]
    assert may_absorb(nn.Linear(8, 8)) and reason_to_stay(nn.Linear(8, 8)) == ""
    assert not may_absorb(layer) and reason_to_stay(layer)


@pytest.mark.parametrize("make", [changed(0), changed(2), changed(0, 2)], ids=["first", "second", "both"])
@pytest.mark.parametrize("kind", CHANGED)
def test_equalize_leaves_it_alone(make, kind):
    model = make(kind)
    before, expected = model_state(model), model(X).detach()
    assert octavo.equalize_(model, X) == []
    assert_unchanged(model, before)
    assert_bits_equal(model(X).detach(), expected)
    with pytest.raises(ValueError, match="can take part are"):
        octavo.equalize_(model, pairs=[("0", "2")])


@pytest.mark.parametrize("kind", CHANGED)
def test_smoothquant_does_not_fold_into_it(kind):
    """The layer stays float, with the same numbers; the next one divides its input."""
    model = changed(0)(kind)
    expected = model[0](X).detach()
    octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
    assert type(model[2]) is octavo.nn.SmoothedLinear
    assert_bits_equal(model[0](X).detach(), expected)


@pytest.mark.parametrize("kind", CHANGED)
def test_nor_into_a_prepared_layer_that_was_changed_afterwards(kind):
    model = mlp()
    octavo.prepare_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()))
    CHANGED[kind](model[0])
    with octavo.calibrating(model):
        expected = model[0](X).detach()
    assert not model[2].is_folded
    with octavo.calibrating(model):
        assert_bits_equal(model[0](X).detach(), expected)


@pytest.mark.parametrize("kind", CHANGED)
def test_nor_does_a_changed_layer_get_smoothed_input(kind):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    octavo.prepare_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()))
    CHANGED[kind](model[1])
    norm = model[0].weight.detach().clone()
    with octavo.calibrating(model):
        model(X)
    assert_bits_equal(model[0].weight.detach(), norm)


def test_a_mapping_that_names_a_changed_layer_is_refused():
    model = changed(0)("pruned")
    before = model_state(model)
    with pytest.raises(
        ValueError, match="fold names '0', which cannot be changed: its weight is no parameter"
    ):
        octavo.quantize_(
            model, octavo.Int8Dynamic(method=octavo.SmoothQuant(fold={"0": ["2"]})), data=[X], include="2"
        )
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "kind",
    [
        "a pruned bias",
        "a parametrized bias",
        "a hook",
        "a forward on the instance",
        "a bias that is a buffer",
    ],
)
def test_a_bias_that_the_output_would_not_follow_is_not_corrected(kind):
    model = mlp()
    octavo.prepare_(model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)))
    CHANGED[kind](model[2])
    before = model_state(model)
    with pytest.raises(ValueError, match="the bias of layer '2' cannot be changed"):
        octavo.correct_bias_(model, mlp(), X)
    assert_unchanged(model, before)


def test_norm_like_is_a_leaf_with_a_weight_of_one_axis():
    assert all(map(is_norm_like, [nn.LayerNorm(3), nn.RMSNorm(3), nn.LayerNorm(3, bias=False)]))
    others = [
        nn.LayerNorm(3, elementwise_affine=False),
        nn.LayerNorm((2, 3)),
        nn.Linear(2, 3),
        nn.BatchNorm1d(3),
    ]
    assert not any(map(is_norm_like, [*others, nn.Sequential(nn.LayerNorm(3)), nn.Embedding(2, 3)]))
