# SPDX-License-Identifier: Apache-2.0
"""Layers that compute the activation that follows: found by who reads what, known by its values, verified."""

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from models import every_scheme
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import octavo
from octavo import ops
from octavo.fusion.steps.activations import activation_of

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
MODULES = {
    "relu": nn.ReLU(),
    "relu, in place": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    **{
        f"transformers {name}": ACT2FN[name]
        for name in ("relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    },
    **{f"transformers {name}": ACT2FN[name] for name in ("gelu_python", "silu", "swish", "gelu_accurate")},
}
NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
NAMES |= {"gelu_python": "gelu", "swish": "silu"}


def expected_name(title: str) -> str:
    name = title.removeprefix("transformers ").removesuffix(", in place")
    return NAMES.get(name, name)


def net(*modules, scheme=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *modules, nn.Linear(16, 8)).eval()
    octavo.quantize_(model, scheme or octavo.Int8Dynamic(), data=X)
    return model


def rows(model, x=X):
    return [row for row in octavo.fuse_(model, x, attention=None).rows if row.step == "activations"]


@pytest.mark.parametrize("title", MODULES)
def test_a_module_is_known_by_its_values(title):
    assert activation_of(MODULES[title]) == expected_name(title)


@pytest.mark.parametrize(
    "module",
    [
        nn.Tanh(),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.ELU(),
        nn.Hardswish(),
        nn.Softmax(-1),
        nn.PReLU(),
        nn.Identity(),
    ]
    + [nn.Dropout(), nn.Flatten(), nn.Linear(3, 3), ACT2FN["quick_gelu"], ACT2FN["gelu_10"], ACT2FN["relu2"]],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_none(module):
    assert activation_of(module.eval()) is None


@torch.no_grad()
@pytest.mark.parametrize("title", MODULES)
def test_the_layer_computes_the_activation(title):
    model = net(MODULES[title])
    before, expected = model_state(model), model(X)
    (row,) = rows(model)
    assert (row.name, row.action) == ("0", "fused") and row.error <= 2**-19 * 4
    assert model[0].activation == expected_name(title)
    assert f"activation={model[0].activation}" in repr(model[0]) and type(model[1]) is nn.Identity
    # The second layer's codes may move by one step where its input was rounded.
    assert F.cosine_similarity(model(X).flatten(), expected.flatten(), 0) >= 0.999
    octavo.unfuse_(model)
    assert_unchanged(model, before)
    assert model[0].activation is None and "activation" not in repr(model[0])
    assert_bits_equal(model(X), expected)


@every_scheme
def test_layers_of_every_scheme_compute_it(scheme):
    model = net(nn.GELU(), scheme=scheme)
    (row,) = rows(model)
    assert row.action == "fused", row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype):
    (row,) = rows(net(nn.GELU()).to(dtype), X.to(dtype))
    assert row.action == "fused", row


class Custom(nn.Module):
    """Two layers, their activation, and a forward for each case."""

    def __init__(self, run):
        super().__init__()
        self.run, self.act = run, nn.GELU()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = [self.act]  # in no place that torch knows of

    def forward(self, x):
        return self.run(self, x)


def custom(run):
    torch.manual_seed(0)
    model = nn.Sequential(Custom(run)).eval()
    octavo.quantize_(model, octavo.Int8Dynamic())
    return model


def test_one_activation_of_two_layers_goes_into_both():
    model = custom(lambda m, x: m.act(m.b(m.act(m.a(x)))))
    assert [(row.name, row.action) for row in rows(model)] == [("0.a", "fused"), ("0.b", "fused")]
    assert model[0].a.activation == model[0].b.activation == "gelu" and type(model[0].act) is nn.Identity


KEPT = {
    "called with something else, too": (
        lambda m, x: m.act(m.a(x)) + m.act(x),
        "what no quantized layer gives",
    ),
    "its input read again": (lambda m, x: m.act(h := m.a(x)) * h, "read elsewhere"),
    "one of two layers is read again": (
        lambda m, x: m.act(m.a(x)) + m.act(h := m.b(x)) * h,
        "read elsewhere",
    ),
    "after a sum": (lambda m, x: m.act(m.a(x) + m.b(x)), "does not read"),
    "called by another name": (lambda m, x: m.again[0](m.a(x)), "by another way"),
}


@pytest.mark.parametrize("run, reason", KEPT.values(), ids=KEPT)
def test_any_other_use_keeps_the_activation(run, reason):
    model = custom(run)
    before = model_state(model)
    found = rows(model)
    assert found and all(row.action == "kept" and reason in row.reason for row in found), found
    assert_unchanged(model, before)
    assert model[0].a.activation is None


def test_one_activation_of_two_layers_goes_into_both_or_none():
    model = custom(lambda m, x: m.act(m.b(m.act(m.a(x)))))
    model[0].b.register_forward_hook(lambda *_: None)
    a, b = rows(model)
    assert "shares a module" in a.reason and "has hooks" in b.reason
    assert model[0].a.activation is None and type(model[0].act) is nn.GELU


def test_hooked_layers_and_activations_are_kept():
    for hooked in (0, 1):
        model = net(nn.ReLU())
        model[hooked].register_forward_hook(lambda *_: None)
        (row,) = rows(model)
        assert "has hooks" in row.reason


def test_a_float_layer_keeps_its_activation():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    (row,) = rows(model)
    assert row.action == "kept" and "quantized layer" in row.reason


def test_a_wrong_operator_is_found_out(monkeypatch):
    """The example's tensors decide: an operator that computes something else is not used."""
    model = net(nn.GELU())
    before = model_state(model)
    linear = ops.linear_dynamic
    monkeypatch.setattr(ops, "linear_dynamic", lambda *args: linear(*args[:6], "relu" if args[6] else None))
    (row,) = rows(model)
    assert row.action == "kept" and "more than rounding explains" in row.reason
    assert_unchanged(model, before)


def test_an_activation_the_example_does_not_reach_is_not_looked_at():
    assert rows(custom(lambda m, x: x)) == []
