# SPDX-License-Identifier: Apache-2.0
"""LoftQ: layer and adapter together are nearer to the float weight than the rounded weight alone."""

import pytest
import torch
from adapted import Network, inputs

import octavo

SCHEME = octavo.Int4WeightOnly(bits=2, group_size=64)


def float_network():
    torch.manual_seed(0)
    return Network(64, 96, 80)


def errors(model, reference):
    """|W - Q - s B A|^2 of each layer."""
    found = []
    for name in ("fc1", "fc2"):
        layer, weight = getattr(model, name), getattr(reference, name).weight.detach()
        base = getattr(layer, "base", layer)
        own = (
            layer.adapters.default.merged(base.dequantize(), 1.0, base)
            if base is not layer
            else base.dequantize()
        )
        found.append(float((weight - own).double().square().sum()))
    return found


def test_more_turns_are_never_worse_and_one_is_better_than_none():
    reference = float_network()
    plain = float_network()
    octavo.quantize_(plain, SCHEME)
    before = rounded = errors(plain, reference)
    for iterations in (1, 5):
        model = float_network()
        report = octavo.loftq_(model, SCHEME, octavo.LoRA(r=8, alpha=4), iterations=iterations)
        after = errors(model, reference)
        assert all(new <= old for new, old in zip(after, before, strict=True))
        assert all(new < old for new, old in zip(after, rounded, strict=True))
        shares = [row.detail for row in report.adapted]
        assert all(
            f"{a / b:.0%} of the error" in text for a, b, text in zip(after, rounded, shares, strict=True)
        )
        before = [value * (1 + 1e-6) for value in after]
    x = inputs(k=64)
    exact = reference(x)
    assert (model(x) - exact).norm() < (plain(x) - exact).norm()
    assert all(parameter.requires_grad for parameter in octavo.adapters(model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((SCHEME, octavo.LoRA(targets="fc1")), "no targets"),
        ((SCHEME, octavo.LoRA(dora=True)), "no dora"),
        ((octavo.Int8Static(), octavo.LoRA()), "needs data"),
        ((SCHEME, octavo.LoRA(), "a.b"), "name of an adapter"),
    ],
)
def test_what_does_not_fit_leaves_the_model_alone(arguments, words):
    model = float_network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        octavo.loftq_(model, *arguments)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(model.fc1, torch.nn.Linear)
