# SPDX-License-Identifier: Apache-2.0
"""Calls are made again as they were, leave nothing behind, and tell what has changed."""

import torch
from asserts import assert_bits_equal
from torch import nn

from octavo.methods.replay import MOST_CALLS, Replay


class Counting(nn.Module):
    """Has all kinds of state: a buffer, an attribute, a list."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.last, self.all = None, []

    def forward(self, x, scale=1.0, cache=None):
        self.seen += 1
        self.last = len(self.all)
        self.all.append(self.last)
        if cache is not None:
            cache["x"] = x = torch.cat([cache["x"], x])
        return {"y": self.linear(x) * scale}


def recorded(model: nn.Module, *calls: tuple[tuple, dict]) -> Replay:
    replay = Replay()
    for args, kwargs in calls:
        replay.begin(model, args, kwargs)
        replay.end(model(*args, **kwargs))
    return replay


def test_a_call_is_repeated_with_its_arguments_as_they_were():
    model, x, cache = Counting(), torch.randn(2, 4), {"x": torch.zeros(1, 4)}
    replay = recorded(model, ((x,), {"cache": cache}))
    x.zero_()
    seen, items = model.seen.clone(), list(model.all)
    assert replay.agrees(0.0) and replay.agrees(0.0)
    assert_bits_equal(model.seen, seen)
    assert model.all == items and model.last == 0


def test_what_has_changed_by_more_than_the_tolerance_is_told():
    model = Counting()
    replay = recorded(model, ((torch.randn(2, 4),), {}))
    with torch.no_grad():
        model.linear.weight.mul_(1 + 2**-10)
    assert not replay.agrees(2**-14) and replay.agrees(2**-6)
    with torch.no_grad():
        model.linear.bias[0] = torch.nan
    assert not replay.agrees(1.0)


def test_the_first_call_and_the_first_with_other_arguments_are_kept():
    model, x = Counting(), torch.ones(2, 4)
    replay = recorded(model, ((x,), {}), ((x + 1,), {}), ((x,), {"scale": 2.0}), ((x[:1],), {}))
    assert len(replay.calls) == MOST_CALLS == 2
    assert [call.kwargs for call in replay.calls] == [{}, {"scale": 2.0}]


def test_what_cannot_be_compared_agrees_with_nothing():
    assert not Replay().agrees(1.0)
    replay = Replay()
    replay.begin(model := Counting(), (torch.ones(1, 4),), {"scale": (i for i in [1])})
    assert replay.is_lost and not replay.agrees(1.0)
    replay = Replay()
    replay.begin(model, (torch.ones(1, 4),), {})
    replay.end("no tensors")
    assert not replay.agrees(1.0)
