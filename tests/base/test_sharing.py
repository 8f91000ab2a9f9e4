# SPDX-License-Identifier: Apache-2.0
"""Who else has a Parameter's memory: found in the model and around it, and nobody who only had it once."""

import torch
from torch import nn

from octavo.base.sharing import Holders, sole_owners, span_of


def test_a_span_covers_what_strides_reach_and_nothing_else():
    x = torch.zeros(4, 6)
    start = x.data_ptr()
    assert span_of(x) == (start, start + 96)
    assert span_of(x[:, 1]) == (start + 4, start + 4 + 4 * (3 * 6 + 1))
    assert span_of(x[:0]) is None and span_of(x.to("meta")) is None


def test_owners_are_told_by_memory_and_neighbours_do_not_share():
    flat = torch.zeros(16)
    model = nn.ModuleDict({name: nn.LayerNorm(4) for name in "abcd"})
    for i, name in enumerate("abc"):
        model[name].weight = nn.Parameter(flat[4 * i : 4 * i + 4])
    assert {model[name] for name in "abcd"} <= sole_owners(model)
    model["d"].register_buffer("view", flat[7:9])
    assert {model[name] for name in "abcd"} & sole_owners(model) == {model["a"]}


def have(model: nn.Module, **options) -> bool:
    return Holders(model).have(model[0], model[0]._parameters.values(), **options)


def test_holders_are_models_views_and_not_what_was_dropped():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    assert not have(model)
    wrapper = nn.ModuleDict({"model": model})
    assert not have(model), "what contains the model is no other model"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not have(model), "an optimizer has the Parameters themselves"
    view = model[0].weight.data
    assert have(model) and not have(model, or_view=False)
    del view, wrapper, optimizer
    assert not have(model)
    cycle = [model.state_dict()]
    cycle.append(cycle)
    del cycle
    assert not have(model), "garbage that waits for the collector is nobody's"
    other = nn.ModuleList([model[0]])
    assert have(model, or_view=False)
    del other


def test_a_half_made_module_elsewhere_is_no_obstacle():
    """Such as one whose unpickling has failed, while a traceback still holds it."""
    model, other = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    other._modules["half"] = nn.Sequential.__new__(nn.Sequential)
    assert not have(model)
