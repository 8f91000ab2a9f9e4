# SPDX-License-Identifier: Apache-2.0
"""Which modules compute by one formula for all inputs, so that a few random ones prove what it is."""

import pytest
import torch
from torch import nn

from octavo.fusion import paths
from octavo.fusion.paths import other_paths
from octavo.fusion.structure import structure_of

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Computes(nn.Module):
    """One linear layer, and `function` of what it gives and of the module."""

    def __init__(self, function, layer_idx=0):
        super().__init__()
        self.layer, self.function, self.layer_idx = nn.Linear(16, 16), function, layer_idx

    def forward(self, x):
        return self.function(self.layer(x), self)


ONE = {
    "smooth functions": lambda y, _: torch.sigmoid(y) * torch.tanh(y) + torch.erf(y) - y.pow(2),
    "views": lambda y, _: y.view(*y.shape[:-1], 4, 4).transpose(-1, -2).reshape(y.shape),
    "a softmax": lambda y, _: torch.softmax(y, -1),
    "another type": lambda y, _: y.to(torch.bfloat16).to(torch.float32),
}
OTHERS = {
    "a limit": (lambda y, _: y.clamp(max=1e6), "operator clamp may take another path"),
    "a choice": (lambda y, _: torch.where(y > 1e6, 0.0, y), "may take another path"),
    "a rounding": (lambda y, _: y * (1 + torch.floor(y / 1e6)), "operator floor may take another path"),
    "a division of whole numbers": (
        lambda y, _: y + torch.div(y, 1e6, rounding_mode="trunc"),
        "operator div may take another path",
    ),
    "a conversion to whole numbers": (lambda y, _: y + (y / 1e6).long(), "operator to may take another path"),
    "a long text": (lambda y, _: y * 2 if y.shape[1] > 64 else y, "other sizes than x.shape[1] <= 64"),
    "one text": (lambda y, _: y * 2 if y.shape[0] == 1 else y, "other sizes than"),
    "values": (lambda y, _: y * 2 if y.max() > 1e6 else y, "torch.export fails"),
}


@pytest.mark.parametrize("function", ONE.values(), ids=ONE)
def test_a_formula_without_conditions_is_the_only_one(function):
    assert other_paths(Computes(function), {"": X}, {}) == ""


@pytest.mark.parametrize(("function", "reason"), OTHERS.values(), ids=OTHERS)
def test_a_path_that_no_example_need_take_is_found(function, reason):
    assert reason in other_paths(Computes(function), {"": X}, {})


def test_a_kink_is_accepted_where_values_are_looked_at():
    module = Computes(lambda y, _: torch.relu(y))
    assert "operator relu" in other_paths(module, {"": X}, {})
    assert other_paths(module, {"": X}, {}, kinks=True) == ""


def test_modules_of_one_structure_are_looked_at_once_unless_they_ask_for_their_number():
    """Every second one has a limit: the first says nothing about the second."""
    for function, answers in (
        (lambda y, _: y * 2, ["", ""]),
        (lambda y, module: y.clamp(max=1e6) if module.layer_idx % 2 else y, ["", "operator clamp may"]),
        (lambda y, module: y.clamp(max=1e6) if module.layer_idx == 1 else y, ["", "operator clamp may"]),
        (lambda y, module: y.clamp(max=1e6) if module.layer_idx else y, ["", "operator clamp may"]),
        (lambda y, module: y.clamp(max=[1e6][module.layer_idx - 1]), ["operator clamp may"] * 2),
        (
            lambda y, module: y.clamp(max={"0": 1e6}.get(str(module.layer_idx), 2e6)),
            ["operator clamp may"] * 2,
        ),
    ):
        proofs = {}
        modules = [Computes(function, number) for number in range(2)]
        found = [other_paths(module, {"": X}, proofs) for module in modules]
        assert all(each.startswith(answer) for each, answer in zip(found, answers, strict=True)), found
        assert [module.layer_idx for module in modules] == [0, 1]
    assert structure_of(modules[0], with_numbers=False) == structure_of(modules[1], with_numbers=False)
    assert structure_of(modules[0], with_numbers=True) != structure_of(modules[1], with_numbers=True)


def test_a_module_that_only_hands_its_number_on_is_looked_at_once_for_all_numbers(monkeypatch):
    """A cache takes the number, and what is no number is told apart, too."""
    looked_at = []
    export = paths.export_block
    monkeypatch.setattr(paths, "export_block", lambda *given: looked_at.append(given) or export(*given))

    def handing_on(y, module):
        def update(y, number):
            assert isinstance(number, int) and number is not None
            return y * 2

        return update(y, module.layer_idx)

    modules, proofs = [Computes(handing_on, number) for number in range(3)], {}
    assert [other_paths(module, {"": X}, proofs) for module in modules] == [""] * 3
    assert len(looked_at) == 1 and [module.layer_idx for module in modules] == [0, 1, 2]
