# SPDX-License-Identifier: Apache-2.0
"""AWQ: AutoAWQ's scales and losses on a block of its own, planted outliers, folding, and what comes after it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import octavo
from octavo import AWQ, GPTQ, Int4WeightOnly, RoundToNearest
from octavo.methods.awq import channel_scales
from octavo.nn import SmoothedLinear
from octavo.schemes import from_dict, label

GOLDEN = np.load(Path(__file__).parents[1] / "data/awq_search.npz")
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN.files if name.endswith("/best_scales")})


def pseudo_quantized(w: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """AutoAWQ's `pseudo_quantize_tensor`, in groups of 32; ranges need not hold 0."""
    rows = w.reshape(-1, 32)
    if symmetric:
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-5) / (2 ** (bits - 1) - 1)
        return ((rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(
            w.shape
        )
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low).clamp_min(1e-5) / (2**bits - 1)
    zero = (-(low / scale).round()).clamp(0, 2**bits - 1)
    return (((rows / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).reshape(w.shape)


@pytest.mark.parametrize("case", CASES)
def test_scales_and_losses_are_those_of_autoawq(case):
    """Of a gated perceptron as a whole: x to silu(fc1 x) * up x to fc2."""
    bits, duo, symmetric = int(case[1]), "duo" in case, case.endswith("sym")
    x, fc1, up, fc2 = (torch.tensor(GOLDEN[name]) for name in ("X", "W_fc1", "W_up", "W_fc2"))

    def block(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, one)) * F.linear(x, other), fc2)

    def loss(s: torch.Tensor) -> float:
        one, other = (pseudo_quantized(w * s, bits, symmetric) / s for w in (fc1, up))
        return (block(one, other) - block(fc1, up)).square().mean().item()

    both = torch.cat([fc1, up]).abs()
    groups = both.reshape(-1, 32)
    mean_weight = (groups / (groups.amax(1, keepdim=True) + 1e-6)).reshape(both.shape).mean(0)
    scales = [channel_scales(x.abs().mean(0), mean_weight, step / 20, duo=duo) for step in range(20)]
    losses = [loss(s) for s in scales]
    np.testing.assert_allclose(losses, GOLDEN[case + "/loss_history"], rtol=1e-4)
    np.testing.assert_allclose(loss(torch.ones(128)), GOLDEN[case + "/loss_rtn"], rtol=1e-4)
    np.testing.assert_allclose(scales[int(np.argmin(losses))], GOLDEN[case + "/best_scales"], rtol=1e-5)


class Gated(nn.Module):
    def __init__(self, k: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(k)
        self.gate, self.up, self.down = nn.Linear(k, 48), nn.Linear(k, 48), nn.Linear(48, k)

    def forward(self, x):
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated(outliers: float = 20.0) -> nn.Module:
    """Three channels that the norm makes large."""
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated()).eval().requires_grad_(False)
    for block in model:
        block.norm.weight[:3] *= outliers
    return model


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 32, 64) for _ in range(4)]


def error(model: nn.Module, scheme) -> float:
    x = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(2))
    quantized = octavo.quantized(model, scheme, data=batches())
    return ((quantized(x) - model(x)).norm() / model(x).norm()).item()


@pytest.mark.parametrize("bits", [3, 4])
def test_planted_outliers_cost_less(bits):
    model, scheme = gated(), Int4WeightOnly(32, bits, method=RoundToNearest())
    rescaled = error(model, Int4WeightOnly(32, bits, method=AWQ(then=RoundToNearest())))
    assert rescaled < 0.85 * error(model, scheme)
    assert error(model, Int4WeightOnly(32, bits, method=AWQ(then=GPTQ()))) < rescaled


def test_norms_absorb_the_scales_and_layers_without_one_multiply_their_input():
    model = octavo.quantized(gated(), Int4WeightOnly(32, method=AWQ()), data=batches())
    assert not isinstance(model[0].gate, SmoothedLinear) and not isinstance(model[0].up, SmoothedLinear)
    assert isinstance(model[0].down, SmoothedLinear)
    assert not torch.equal(model[0].norm.weight, gated()[0].norm.weight)
    assert (
        label(model[0].gate.scheme) == "Int4WeightOnly"
        and label(model[0].down.scheme) == "Int4WeightOnly(method=AWQ)"
    )


def test_a_saved_model_gives_the_same(tmp_path):
    model = octavo.quantized(gated(), Int4WeightOnly(32, method=AWQ(then=GPTQ())), data=batches())
    octavo.save(model, tmp_path)
    loaded = octavo.load(tmp_path, gated())
    assert torch.equal(loaded(batches()[0]), model(batches()[0]))


def test_dead_channels_get_no_factor_and_everything_else_a_finite_one():
    mean_input = torch.tensor([0.0, 1.0, 1e-30, 1e30])
    for ratio in (0.0, 0.5, 0.95):
        s = channel_scales(mean_input, torch.tensor([0.5, 0.0, 0.5, 1.0]), ratio)
        assert s.isfinite().all() and (s > 0).all() and s[0] == 1


def test_combinations_compose_or_are_refused_in_words():
    for method in (AWQ(then=GPTQ(0.05)), octavo.SmoothQuant(0.7, then=GPTQ()), AWQ(duo=False)):
        scheme = octavo.Int8Dynamic(method=method)
        assert from_dict(scheme.to_dict()) == scheme and scheme.method.then_for(scheme.weights) is not None
    with pytest.raises(
        ValueError, match="AWQ: then is SmoothQuant, and both multiply the columns of a weight"
    ):
        AWQ(then=octavo.SmoothQuant())
    with pytest.raises(ValueError, match="AWQ does not go with LLMInt8"):
        octavo.LLMInt8(method=AWQ())
    with pytest.raises(ValueError, match="HQQ improves zero points, and Int4WeightOnly has none"):
        Int4WeightOnly(method=AWQ(then=octavo.HQQ()))
    with pytest.raises(ValueError, match="AWQ: steps must be at least 1, got 0"):
        AWQ(0)
    with pytest.raises(ValueError, match="needs data"):
        octavo.quantized(gated(), Int4WeightOnly(method=AWQ()))


def test_smoothing_and_static_inputs_go_together_with_compensation():
    model = gated(5.0)
    scheme = octavo.Int8Static(octavo.observers.MinMax(), method=octavo.SmoothQuant(then=GPTQ()))
    assert error(model, scheme) < error(model, octavo.Int8Static(octavo.observers.MinMax()))
