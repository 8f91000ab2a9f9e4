# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: the model computes what it did, and pairs of layers share their ranges."""

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, assert_within, model_state
from torch import nn

import octavo
from octavo.methods.equalization import EqualizedPair, equalizing_scales


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = seeded(50, 12)


def mlp(bias: bool = True) -> nn.Sequential:
    """Three layers; channels between them differ in range by 2^16."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 20, bias), nn.ReLU(), nn.Linear(20, 20, bias), nn.ReLU(), nn.Linear(20, 5, bias)
    )
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight.mul_(torch.logspace(-8, 8, 20, base=2)[:, None])
            model[i + 2].weight.div_(torch.logspace(-8, 8, 20, base=2))
    return model


def ranges(model: nn.Sequential, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest |weight| in the rows of layer i and in the columns of the next one."""
    return model[i].weight.detach().abs().amax(1), model[i + 2].weight.detach().abs().amax(0)


def assert_relative(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert_within(actual, expected, tolerance * expected.abs().max().item())


def oracle(
    w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 11 of the paper for one pair, channel by channel, in float64."""
    w1, b1, w2 = w1.double().clone(), b1.double().clone(), w2.double().clone()
    for i in range(len(w1)):
        r1, r2 = w1[i].abs().max(), w2[:, i].abs().max()
        s = r1 / (r1 * r2).sqrt()
        w1[i] /= s
        b1[i] /= s
        w2[:, i] *= s
    return w1, b1, w2


def test_one_pair_is_that_of_the_paper():
    model = mlp()
    expected = oracle(model[0].weight.detach(), model[0].bias.detach(), model[2].weight.detach())
    assert octavo.equalize_(model, pairs=[("0", "2")]) == [EqualizedPair("0", ("2",))]
    for found, wanted in zip((model[0].weight, model[0].bias, model[2].weight), expected, strict=True):
        assert_within(found, wanted, wanted.abs() * 2**-22)  # a rounding in each of two sweeps


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_stays_and_ranges_become_equal(bias):
    model = mlp(bias)
    expected = model(X).detach()
    parameters = list(model.parameters())
    found = octavo.equalize_(model, X)
    assert found == [EqualizedPair("0", ("2",)), EqualizedPair("2", ("4",))]
    assert_relative(model(X), expected, 1e-5)
    for i in (0, 2):
        rows, columns = ranges(model, i)
        assert_within(rows, columns, columns * 0.02)  # the sweeps end when no s is more than 1 % from 1
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_it_gains_where_a_scale_is_for_the_whole_tensor():
    """A static input has one; the weight has one for each row, which equalization of the first layer does not touch."""
    plain, equalized = mlp(), mlp()
    octavo.equalize_(equalized, X)
    figures = []
    for model in (plain, equalized):
        fast = octavo.quantized(model, octavo.Int8Static(octavo.observers.MinMax()), data=X)
        figures.append(octavo.compare(model, fast, X).output.sqnr_db)
    assert figures[1] > figures[0] + 10


def test_channels_without_weights_are_left_alone():
    assert_bits_equal(
        equalizing_scales(torch.tensor([0.0, 4.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 0.0, 0.0])),
        torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64),
    )
    model = mlp()
    model[0].weight.data[3], model[2].weight.data[:, 5] = 0.0, 0.0
    expected = model(X).detach()
    octavo.equalize_(model, X)
    assert_relative(model(X), expected, 1e-5)


class Branches(nn.Module):
    """One layer feeds two through a ReLU, its weight is tied to nothing; `out` is tied to `embedding`."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.gelu, self.fourth = nn.GELU(), nn.Linear(6, 3)
        self.relu, self.embedding, self.out = nn.ReLU(), nn.Embedding(4, 3), nn.Linear(3, 4)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        h = self.relu(self.first(x))
        return self.out(self.relu(self.fourth(self.gelu(self.second(h) - self.third(h)))))


def test_several_readers_share_one_s_and_others_are_not_pairs():
    """GELU is not homogeneous, a difference is not understood, a tied weight is somebody else's."""
    model = Branches()
    expected = model(X).detach()
    assert octavo.equalize_(model, X) == [EqualizedPair("first", ("second", "third"))]
    assert_relative(model(X), expected, 1e-5)
    both = torch.cat([model.second.weight, model.third.weight])
    assert_within(model.first.weight.abs().amax(1), both.abs().amax(0).detach(), 0.02)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({}, "give data, to find the pairs, or pairs"),
        ({"data": X, "pairs": []}, "give data, to find the pairs, or pairs"),
        (
            {"pairs": [("0", "1")]},
            "'1' is no linear layer of the model.*those that can take part are 0, 2, 4",
        ),
        ({"pairs": [("0", "2"), ("4", "2")]}, "'4' gives 5 features and '2' takes 20"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_stays(arguments, text):
    model = mlp()
    before = model_state(model)
    with pytest.raises(ValueError, match=text):
        octavo.equalize_(model, **arguments)
    assert_unchanged(model, before)


def test_weights_with_nan_and_what_is_no_module_are_refused():
    model = mlp()
    model[4].weight.data[0, 0] = torch.nan
    before = model_state(model)
    with pytest.raises(ValueError, match="4.weight holds NaN or Inf"):
        octavo.equalize_(model, X)
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        octavo.equalize_([], X)
