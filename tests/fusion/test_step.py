# SPDX-License-Identifier: Apache-2.0
"""A step of fusion is an object with a name and `find`; fuse.py verifies places, applies them and takes them back."""

from functools import partial

import torch
from asserts import assert_bits_equal
from torch import nn

import octavo
from octavo.fusion.fuse import run_steps
from octavo.fusion.step import Candidate

X = torch.linspace(-2, 2, 40).reshape(5, 8)


class Doubled(nn.Module):
    def forward(self, x):
        return x + x


class Wrong(nn.Module):
    def forward(self, x):
        return x + 1


class Doubling:
    """Every Doubled becomes a Linear that doubles, or `replacement`."""

    name = "doubling"

    def __init__(self, replacement: nn.Module):
        self.replacement = replacement

    def find(self, model, example):
        for name, module in model.named_modules():
            if isinstance(module, Doubled):
                place = Candidate(name, type(module).__name__, reads=module, gives=module)
                place.compute, place.bound = self.replacement.forward, lambda expected, x: 0.0
                place.apply = partial(
                    lambda old, changes: changes.replace(model, old, self.replacement), module
                )
                return [place]
        return []


def doubling() -> nn.Linear:
    linear = nn.Linear(8, 8, bias=False)
    linear.weight = nn.Parameter(2 * torch.eye(8))
    return linear


def test_a_step_is_verified_applied_reported_and_undone():
    model = nn.Sequential(nn.Linear(8, 8), Doubled()).eval()
    expected, before = model(X), model[1]
    report = run_steps(model, X, [Doubling(doubling())], 0.999)
    assert [(row.step, row.name) for row in report.fused] == [("doubling", "1")]
    assert isinstance(model[1], nn.Linear)
    assert_bits_equal(model(X), expected)
    octavo.unfuse_(model)
    assert model[1] is before


def test_what_computes_something_else_stays():
    model = nn.Sequential(nn.Linear(8, 8), Doubled()).eval()
    report = run_steps(model, X, [Doubling(Wrong())], 0.999)
    assert not report.fused and report.kept[0].reason and isinstance(model[1], Doubled)
