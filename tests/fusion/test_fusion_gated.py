# SPDX-License-Identifier: Apache-2.0
"""Gated feed-forward modules: what is one, and that GatedMLP gives what they gave."""

import copy

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from torch import nn

import octavo
from octavo.nn import GatedMLP

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    """Of the Llama kind; `end` is what happens to what down_proj gives."""

    def __init__(self, n=96, bias=False, act=None, end=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, n, bias=bias), nn.Linear(64, n, bias=bias)
        self.down_proj, self.act_fn, self.end = nn.Linear(n, 64, bias=bias), act or nn.SiLU(), end

    def forward(self, x):
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.end(y) if self.end else y


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Limited(MLP):
    """Clips, as some mixtures of experts do, where no example of this test comes."""

    def forward(self, x):
        y = self.act_fn(self.gate_proj(x).clamp(max=1e6)) * self.up_proj(x).clamp(-1e6, 1e6)
        return self.down_proj(y)


def model(kind=MLP, scheme=None, **options) -> nn.Module:
    torch.manual_seed(0)
    m = nn.Sequential(kind(**options)).eval()
    if scheme:
        octavo.quantize_(m, scheme, data=X)
    return m


def row_of(m):
    (row,) = [row for row in octavo.fuse_(m, X, attention=None).rows if row.step == "gated"]
    return row


@torch.no_grad()
@pytest.mark.parametrize("scheme", [None, octavo.Int8Dynamic(), octavo.Int8WeightOnly(), octavo.Int8Static()])
@pytest.mark.parametrize("n, bias", [(96, False), (96, True), (72, False)])
def test_a_gated_module_is_replaced_and_its_layers_stay(scheme, n, bias):
    m = model(scheme=scheme, n=n, bias=bias)
    before, layers, expected = model_state(m), dict(m[0].named_children()), m(X)
    row = row_of(m)
    assert (row.name, row.kind, row.action) == ("0", "MLP", "fused")
    assert type(m[0]) is GatedMLP and all(m[0].get_submodule(name) is layers[name] for name in m[0]._modules)
    assert m.state_dict().keys() == before["tensors"].keys()
    assert m[0]._shared.is_joined == (type(m[0].gate_proj) is octavo.nn.QuantLinear and n % 16 == 0)
    assert torch.cosine_similarity(m(X).flatten(), expected.flatten(), 0) >= 0.999
    assert_unchanged(octavo.unfuse_(m), before)
    assert_bits_equal(m(X), expected)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"act": nn.GELU()}, "its activation is gelu, not silu"),
        ({"act": nn.Tanh()}, "its activation is Tanh, not silu"),
        ({"end": nn.Dropout()}, "more than three layers and an activation"),
        ({"end": lambda y: y * 2}, "something else than its last layer"),
        ({"kind": Swapped}, "more than rounding explains"),
        ({"kind": Limited}, "operator clamp may take another path for other inputs"),
    ],
)
def test_other_forms_are_kept(options, reason):
    m = model(**options)
    before = model_state(m)
    row = row_of(m)
    assert row.action == "kept" and reason in row.reason, row
    assert_unchanged(m, before)


def test_hooks_and_the_model_itself_are_kept():
    hooked = model()
    hooked[0].register_forward_hook(lambda *_: None)
    assert "has hooks" in row_of(hooked).reason
    assert "cannot be replaced in place" in row_of(MLP().eval()).reason


# --- nn.GatedMLP ----------------------------------------------------------------------------------------------------


def gated(scheme=None) -> GatedMLP:
    m = model(scheme=scheme or octavo.Int8Dynamic())
    assert row_of(m).action == "fused"
    return m[0]


@torch.no_grad()
def test_a_layer_that_somebody_replaces_is_the_one_that_counts():
    """As adapters do: they put a layer of their own around ours."""
    mlp = gated()
    mlp(X)
    mlp.gate_proj = wrapper = nn.Sequential(mlp.gate_proj)
    wrapper.register_forward_hook(lambda module, args, y: y * 0)
    assert not mlp(X).any()


@torch.no_grad()
def test_loaded_weights_count_and_old_ones_go():
    mlp, other = gated(), gated()
    mlp(X)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    mlp.load_state_dict(other.state_dict())
    assert mlp._shared._joined is None
    assert_bits_equal(mlp(X), other(X))


@torch.no_grad()
def test_a_copy_has_weights_of_its_own():
    mlp = gated()
    expected, twin = mlp(X), copy.deepcopy(mlp)
    mlp.gate_proj.weight_scale.zero_()
    assert_bits_equal(twin(X), expected)
    assert twin._shared.layers[0] is twin.gate_proj and twin._shared.is_joined


def test_a_wrong_width_is_refused_by_the_layer():
    with pytest.raises(ValueError, match="in_features = 64"):
        gated()(X[:, :63])
