# SPDX-License-Identifier: Apache-2.0
"""RMSNorm classes: accepted by name and attributes, and then only if they compute what ours does."""

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, assert_within, model_state
from torch import nn

import octavo
from octavo import ops
from octavo.nn import RMSNorm

X = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))


class LlamaRMSNorm(nn.Module):
    offset = 0.0

    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(48)), eps

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.finish(y.to(x.dtype))

    def finish(self, y):
        return (self.offset + self.weight) * y


class GemmaRMSNorm(LlamaRMSNorm):
    offset = 1.0


class ShiftedRMSNorm(LlamaRMSNorm):
    offset = 0.5


class MeanRMSNorm(LlamaRMSNorm):
    def finish(self, y):
        return self.weight * (y - y.mean(-1, keepdim=True))


class BiasRMSNorm(LlamaRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(48))


class FixedEpsRMSNorm(LlamaRMSNorm):
    """Says one eps and computes with another."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


class LimitedRMSNorm(LlamaRMSNorm):
    def finish(self, y):
        return super().finish(y).clamp(-1e6, 1e6)


def torch_norm():
    norm = nn.RMSNorm(48)
    norm.weight.data.normal_()
    return norm


def model(norm) -> nn.Module:
    return nn.Sequential(nn.Linear(48, 48), norm).eval()


def row_of(m, x=X):
    (row,) = [row for row in octavo.fuse_(m, x, attention=None).rows if row.step == "norms"]
    return row


@torch.no_grad()
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, torch_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_replaced_and_keeps_its_parameter(kind, dtype):
    m = model(kind()).to(dtype)
    x = X.to(dtype)
    before, expected, norm = model_state(m), m(x), m[1]
    row = row_of(m, x)
    assert row.action == "fused" and row.kind == type(norm).__name__, row
    assert (
        type(m[1]) is RMSNorm and m[1].weight is norm.weight and m[1].offset == getattr(norm, "offset", 0.0)
    )
    assert m.state_dict().keys() == before["tensors"].keys()
    assert_within(m(x), expected, row.error)
    assert_unchanged(octavo.unfuse_(m), before)
    assert_bits_equal(m(x), expected)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (ShiftedRMSNorm, "something else than"),
        (MeanRMSNorm, "something else than"),
        (FixedEpsRMSNorm, "something else than"),
        (BiasRMSNorm, "not one weight"),
        (LimitedRMSNorm, "operator clamp may take another path for other inputs"),
        (lambda: nn.RMSNorm(48, elementwise_affine=False), "not one weight"),
    ],
)
def test_what_computes_something_else_is_kept(kind, reason):
    m = model(kind())
    before = model_state(m)
    row = row_of(m)
    assert row.action == "kept" and reason in row.reason, row
    assert_unchanged(m, before)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2])
def test_the_eps_is_the_modules(eps):
    m = model(LlamaRMSNorm(eps))
    assert row_of(m).action == "fused" and m[1].eps == eps


def test_layer_norms_are_no_rms_norms():
    assert octavo.fuse_(model(nn.LayerNorm(48)), X, attention=None).rows == []


def test_hooks_and_the_model_itself_are_kept():
    m = model(LlamaRMSNorm())
    m[1].register_forward_hook(lambda *_: None)
    assert "has hooks" in row_of(m).reason
    assert "cannot be replaced in place" in row_of(LlamaRMSNorm().eval()).reason


def test_a_norm_in_two_places_is_replaced_in_both():
    norm = LlamaRMSNorm()
    m = nn.Sequential(norm, nn.Linear(48, 48), norm).eval()
    assert row_of(m).action == "fused"
    assert type(m[0]) is RMSNorm and m[0] is m[2]


@torch.no_grad()
def test_a_norm_called_by_another_reference_is_kept():
    m = model(LlamaRMSNorm())
    norm = m[1]
    m.append(nn.Identity().eval())
    m[2].forward = lambda x: norm(x)
    row = row_of(m)
    assert "by another way" in row.reason and m[1] is norm


def test_an_operator_that_is_off_is_found_out(monkeypatch):
    operator = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, eps: operator(x, weight, eps) * 1.001)
    assert row_of(model(LlamaRMSNorm())).action == "kept"


# --- nn.RMSNorm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_torchs(offset):
    """x / rms(x) * (offset + weight), differentiated by autograd in float64."""
    norm = RMSNorm(nn.Parameter(torch.randn(48)), 1e-6, offset)
    x = X.clone().requires_grad_()
    norm(x).square().sum().backward()
    twin, weight = X.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = twin * torch.rsqrt(twin.pow(2).mean(-1, keepdim=True) + 1e-6) * (weight + offset)
    y.square().sum().backward()
    for found, expected in ((x.grad, twin.grad), (norm.weight.grad, weight.grad)):
        assert (found - expected).norm() <= 2**-18 * expected.norm()


def test_its_repr_shows_what_it_computes():
    norm = RMSNorm(nn.Parameter(torch.ones(3)), 1e-6, 1.0)
    assert repr(norm) == "RMSNorm((3,), eps=1e-06, offset=1.0)"
