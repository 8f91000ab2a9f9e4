# SPDX-License-Identifier: Apache-2.0
"""Modules that call F.scaled_dot_product_attention: ours inside of them, torch's everywhere else."""

import copy

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from torch import nn
from torch.nn import functional as F

import octavo
from octavo import ops

X = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))


class SelfAttention(nn.Module):
    """Four heads of 16."""

    def __init__(self, **options):
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(64, 192), nn.Linear(64, 64), options

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


@pytest.fixture
def calls(monkeypatch):
    seen = []
    attention = ops.attention

    def watched(*args, **options):
        seen.append(options)
        return attention(*args, **options)

    monkeypatch.setattr(ops, "attention", watched)
    return seen


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(SelfAttention(**options), nn.GELU(), SelfAttention(**options)).eval()


def fused(m):
    return octavo.fuse_(m, X, attention="float32", plain_attention=True)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.1}, {"attn_mask": torch.ones(6, 6).tril() > 0}]
)
def test_the_calls_inside_are_ours_and_give_the_same(calls, options):
    m = model(**options)
    expected, before = m(X), model_state(m)
    report = fused(m)
    assert [row.name for row in report.fused] == ["0", "2"] and report.fused[0].step == "plain attention"
    calls.clear()
    assert (m(X) - expected).norm() <= 2**-16 * expected.norm()
    assert len(calls) == 2 and calls[0]["precision"] == "float32"
    assert_unchanged(octavo.unfuse_(m), before)
    assert_bits_equal(m(X), expected)


@torch.no_grad()
def test_products_of_codes_are_chosen_as_others_are(calls):
    m, x = model(), torch.cat([X, X], 1)
    expected = m(x)
    assert len(octavo.fuse_(m, x, attention="int8", plain_attention=True).fused) == 2
    calls.clear()
    assert not torch.equal(m(x), expected)
    assert [call["precision"] for call in calls] == ["int8"] * 2


@torch.no_grad()
def test_calls_outside_stay_torchs(calls):
    m = model()
    fused(m)
    calls.clear()
    q = torch.randn(1, 2, 3, 16)
    F.scaled_dot_product_attention(q, q, q)
    model()(X)
    assert calls == []


def test_only_when_asked_for(calls):
    m = model()
    report = octavo.fuse_(m, X)
    assert report.fused == [] and calls == []


@torch.no_grad()
def test_other_shapes_go_on_to_torch(calls):
    q = torch.randn(3, 5, 20)
    with octavo.fusion.steps.plain_attention._Ours("auto"):
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q[None], q[None], q[None])
        F.scaled_dot_product_attention(X[None], X[None, :, :3], X[None, :, :3], is_causal=True)
    assert calls == []


def test_dropout_is_refused():
    m = model(dropout_p=0.1)
    report = fused(m)
    assert all("no dropout" in row.reason for row in report.kept if row.step == "plain attention")
    assert report.fused == []


@torch.no_grad()
def test_copies_and_compiled_models(calls):
    m = model()
    fused(m)
    expected = m(X)
    twin = copy.deepcopy(m)
    m[0].qkv.weight.zero_()
    assert_bits_equal(twin(X), expected)
    torch.compiler.reset()
    assert_bits_equal(torch.compile(twin, backend="aot_eager")(X), expected)


def test_hooked_and_rebound_modules_are_kept():
    m = model()
    m[0].register_forward_hook(lambda *_: None)
    m[2].forward = m[2].forward
    reasons = [row.reason for row in fused(m).kept if row.step == "plain attention"]
    assert "has hooks" in reasons[0] and "a forward of its own" in reasons[1]


def test_hooks_of_accelerate_are_called_by_their_name():
    """It puts them around forward, and notes them in `_hf_hook`."""
    m = model()
    m[0].forward, m[0]._hf_hook = m[0].forward, object()
    (row,) = [row for row in fused(m).kept if row.name == "0"]
    assert row.reason == "accelerate has put hooks around its forward: fuse before you dispatch the model"
