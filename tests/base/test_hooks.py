# SPDX-License-Identifier: Apache-2.0
"""hooked: each hook sees the calls of its module, in the order that was asked for, and none is left afterwards."""

import pytest
import torch
from torch import nn

from octavo.base.hooks import hooked

X = torch.ones(1, 2)


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("no")


def hooks_of(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_hooks_are_called_while_the_block_runs_and_gone_after_it():
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *_: seen.append("user's"))
    with (
        hooked([(layer, lambda module, args, kwargs: seen.append("before"))], before=True),
        hooked([(layer, lambda module, args, kwargs: seen.append("first"))], before=True, first=True),
        hooked([(layer, lambda module, args, kwargs, y: seen.append(y.shape))]),
    ):
        layer(X)
    assert seen == ["first", "user's", "before", (1, 2)]
    layer(X)
    assert seen[4:] == ["user's"] and hooks_of(layer) == 1


def test_after_an_error_only_those_that_always_run_have_run_and_none_is_left():
    layer, seen = Failing(), []
    with pytest.raises(RuntimeError, match="no"):
        with (
            hooked([(layer, lambda module, args, kwargs, y: seen.append("plain"))]),
            hooked([(layer, lambda module, args, kwargs, y: seen.append(y))], always=True),
        ):
            layer(X)
    assert seen == [None] and hooks_of(layer) == 0
