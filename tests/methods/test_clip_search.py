# SPDX-License-Identifier: Apache-2.0
"""Clip search: never worse than rounding, as good as trying everything, the same in any pieces, for every format."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import octavo
from octavo import ClipSearch
from octavo.formats import FP4, MXFP4, NF4, Int8, IntGroup
from octavo.methods import clip_search, default_method
from octavo.schemes import from_dict, label

FORMATS = [
    IntGroup(4, 32),
    IntGroup(3, 48, False),
    IntGroup(2, 16, False, "float32"),
    IntGroup(4, None),
    Int8(),
    NF4(32, False),
    FP4(64, False),
    MXFP4(),
]
every_format = pytest.mark.parametrize("weights", FORMATS, ids=label)


def weight(n: int = 24, k: int = 80) -> torch.Tensor:
    """Heavy tails, and rows that are zero, constant, of one sign, tiny and large."""
    torch.manual_seed(0)
    w = torch.randn(n, k) ** 3
    w[0], w[1], w[2], w[3], w[4] = 0, 0.3, w[2].abs(), 1e-3 * w[3], 1e3 * w[4]
    return w


def errors(q, w: torch.Tensor, gram: torch.Tensor | None = None, power: float | None = None) -> torch.Tensor:
    """Squared errors [n, groups]: plain, as inputs count them, or with the importance of large weights."""
    e = (q.quantize(w).dequantize() - w).double()
    width = getattr(q.granularity, "group_size", w.shape[1])
    parts = []
    for at in (slice(i, i + width) for i in range(0, w.shape[1], width)):
        if gram is not None:
            parts.append(((e[:, at] @ gram[at, at]) * e[:, at]).sum(1))
        else:
            squares = w[:, at].double().square()
            mean = squares.sum(1, keepdim=True) / width
            counts = 1.0 if power is None else (mean + squares) ** power
            parts.append((counts * e[:, at].square()).sum(1))
    return torch.stack(parts, 1)


@every_format
@pytest.mark.parametrize("refit", [True, False])
def test_no_group_is_further_off_than_with_plain_rounding(weights, refit):
    w = weight()
    covering, found = weights.qparams(w), ClipSearch(refit=refit).qparams(weights, w)
    power = 1.0 if weights.bits == 2 else 0.5
    before, after = errors(covering, w, None, power), errors(found, w, None, power)
    squares = errors(replace(covering, scale=covering.scale * 1e9), w, None, power)  # all codes are 0
    # The gain of a group is a sum in float32: it is known to a few 2^-24 of the square of the group.
    assert (after <= before + 2.0**-19 * squares).all() and found.scale.shape == covering.scale.shape
    assert after.sum() < before.sum() or isinstance(weights, MXFP4)  # its scales are powers of two


@pytest.mark.parametrize(
    "weights", [IntGroup(4, 32, True, "float32"), IntGroup(3, 32, False, "float32")], ids=label
)
def test_it_comes_close_to_the_best_of_all_scales(weights):
    """Two thousand scales for each group, tried one by one in float64: the search is within 5 % of the best error."""
    torch.manual_seed(1)
    w = torch.randn(64, 32)
    q = weights.qparams(w)
    z = q.zero_point.double()
    least = torch.full((64, 1), torch.inf).double()
    for share in torch.linspace(0.3, 1.3, 2_000).double():
        s = share * q.scale.double()
        codes = (w / s).round().clamp(q.qmin - z, q.qmax - z)
        counts = (w.square().mean(1, keepdim=True) + w.square()).sqrt()
        least = torch.minimum(least, (counts * (codes * s - w).square()).sum(1, keepdim=True))
    assert errors(ClipSearch().qparams(weights, w), w, None, 0.5).sum() <= 1.05 * least.sum()


@pytest.mark.parametrize("weights", [IntGroup(3, 32), IntGroup(4, None), NF4(16, False)], ids=label)
def test_with_inputs_the_error_of_the_output_counts(weights):
    w, x = weight(), torch.randn(200, 80) * torch.linspace(0.1, 4, 80)
    gram = (x.T @ x).double()
    plain, found = ClipSearch().qparams(weights, w), ClipSearch().qparams(weights, w, gram)
    covering = errors(weights.qparams(w), w, gram)
    assert (errors(found, w, gram) <= covering * (1 + 1e-4)).all()
    assert errors(found, w, gram).sum() < errors(plain, w, gram).sum()


def test_the_pieces_do_not_show(monkeypatch):
    w = weight()
    whole = ClipSearch().qparams(IntGroup(3, 16), w)
    monkeypatch.setattr(clip_search, "PIECE", 16 * 7)
    assert torch.equal(ClipSearch().qparams(IntGroup(3, 16), w).scale, whole.scale)


def test_it_is_the_default_of_integer_groups_of_few_bits_alone():
    for bits in range(2, 9):
        expected = ClipSearch() if bits <= 4 else octavo.RoundToNearest()
        for scheme in (octavo.Int4Dynamic(bits=bits), octavo.Int4WeightOnly(64, bits, symmetric=False)):
            assert scheme.method == expected and from_dict(scheme.to_dict()) == scheme
            assert "method" not in label(scheme)
    for scheme in (octavo.NF4(), octavo.MXFP4(), octavo.Int8Dynamic(), octavo.Int8Dynamic(group_size=32)):
        assert scheme.method == default_method(scheme.weights) == octavo.RoundToNearest()
    # Other bits have their own default, unless the user has named a method.
    few, named = octavo.Int4Dynamic(bits=8), octavo.Int4Dynamic(method=octavo.RoundToNearest())
    assert few.with_weights(IntGroup(4)).method == ClipSearch()
    assert named.with_weights(IntGroup(3)).method == octavo.RoundToNearest()


def test_training_freezing_and_quantizing_agree():
    model = nn.Sequential(nn.Linear(80, 24))
    octavo.prepare_(model, octavo.Int4WeightOnly(bits=3))
    expected = model[0].fake_quantized_weight().detach()
    model(torch.randn(2, 80)).sum().backward()
    assert model[0].weight.grad is not None
    octavo.freeze_(model)
    assert torch.equal(model[0].dequantize(), expected)


def test_what_makes_no_sense_is_refused_in_words():
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        ClipSearch(1)
    with pytest.raises(ValueError, match="ClipSearch finds scales, and HalfWeightOnly has none"):
        octavo.HalfWeightOnly(method=ClipSearch())
    with pytest.raises(ValueError, match="NaN or Inf"):
        ClipSearch().qparams(IntGroup(), torch.full((2, 32), torch.nan))
