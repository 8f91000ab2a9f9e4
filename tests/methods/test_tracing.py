# SPDX-License-Identifier: Apache-2.0
"""Who reads what a module gives: every use that is not a layer's input breaks a group up, seen or not understood."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octavo.methods.tracing import traced


class Net(nn.Module):
    """Two norms, three linear layers of one size and what modules a forward may want; `run` is its forward."""

    def __init__(self, run, layers="abc"):
        super().__init__()
        self.run, self.layers = run, layers
        self.norm, self.other = nn.LayerNorm(8), nn.RMSNorm(8)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.relu, self.drop, self.same = nn.ReLU(), nn.Dropout(), nn.Identity()
        self.inner = nn.Sequential(self.norm, self.same)

    def forward(self, x, step=0):
        return self.run(self, x, step) if self.run.__code__.co_argcount == 3 else self.run(self, x)


def groups(net: Net, steps: int = 1) -> list[tuple[str, str, bool]]:
    """(producer, its consumers, through a ReLU) of all groups that are found."""
    names = {module: name for name, module in net.named_modules()}
    with traced(net.eval(), [getattr(net, name) for name in net.layers]) as trace:
        for step in range(steps):
            net(torch.randn(2, 3, 8), step)
    found = trace.groups()
    return [(names[g.producer], "".join(names[c] for c in g.consumers), g.through_relu) for g in found]


def shared(net, x):
    h = net.norm(x)
    return net.a(h) + net.b(h)


FOUND = {
    "one reader": (lambda net, x: net.a(net.norm(x)), [("norm", "a", False)]),
    "several readers": (shared, [("norm", "ab", False)]),
    "by keyword": (lambda net, x: net.a(input=net.norm(x)), [("norm", "a", False)]),
    "a chain": (
        lambda net, x: net.b(net.relu(net.a(net.norm(x)))),
        [("norm", "a", False), ("a", "b", True)],
    ),
    "functional ReLU": (lambda net, x: net.b(F.relu(net.a(x))), [("a", "b", True)]),
    "method": (lambda net, x: net.b(net.a(x).relu()), [("a", "b", True)]),
    "ReLU in place": (lambda net, x: net.b(net.a(x).relu_()), [("a", "b", True)]),
    "in a module": (lambda net, x: net.a(net.inner(x)), [("norm", "a", False)]),
    "dropout in eval mode": (lambda net, x: net.a(net.drop(net.norm(x))), [("norm", "a", False)]),
    "questions": (
        lambda net, x: net.a(h) if (h := net.norm(x)).shape[0] and h.dim() else h,
        [("norm", "a", False)],
    ),
    "contiguous": (lambda net, x: net.a(net.norm(x).contiguous().to(torch.float32)), [("norm", "a", False)]),
    "norm used twice": (lambda net, x: net.a(net.norm(x)) + net.b(net.norm(x + 1)), [("norm", "ab", False)]),
}


@pytest.mark.parametrize("run, expected", FOUND.values(), ids=FOUND)
def test_a_group_is_found(run, expected):
    assert groups(Net(run)) == expected


def residual(net, x):
    h = net.norm(x)
    return h + net.a(h)


def one_of_two_through_relu(net, x):
    h = net.a(x)
    return net.b(h) + net.c(net.relu(h))


def stored(net, x):
    h = net.norm(x)
    return {"y": net.a(h), "hidden": (x, [h])}


def looked_at(net, x):
    h = net.norm(x)
    return net.a(h) if h.sum().item() > -1e9 else h


def later_batch_differs(net, x, step):
    h = net.norm(x)
    return net.a(h) + (h if step else 0)


OTHER_USES = {
    "a residual sum": residual,
    "part of the output": stored,
    "its values decide": looked_at,
    "a later batch": later_batch_differs,
    "a slice": lambda net, x: net.a(net.norm(x)[:1]),
    "a view": lambda net, x: net.a(net.norm(x).reshape(-1, 8)),
    "transposed by an attribute": lambda net, x: net.a(h := net.norm(x)) + h.mT.mT,
    "changed in place": lambda net, x: net.a(net.norm(x).add_(1)),
    "another activation": lambda net, x: net.a(F.gelu(net.norm(x))),
    "ReLU for one of two": one_of_two_through_relu,
    "a weight that is read": lambda net, x: F.linear(net.norm(x), net.a.weight) + net.a(x),
    "numpy": lambda net, x: net.a(h := net.norm(x)) + torch.from_numpy(h.numpy()),
    "dropout in training": lambda net, x: net.a(F.dropout(net.norm(x), training=True)),
}


@pytest.mark.parametrize("run", OTHER_USES.values(), ids=OTHER_USES)
def test_another_use_is_noticed(run):
    with torch.no_grad():
        assert [group for group in groups(Net(run), steps=2) if group[0] != "b"] == []


def test_a_reader_that_was_not_asked_for_is_another_use():
    assert groups(Net(shared, layers="a")) == []


def test_a_layer_with_two_sources_is_in_no_group():
    assert groups(Net(lambda net, x: net.a(net.norm(x)) + net.a(net.other(x)))) == []
    assert groups(Net(lambda net, x: net.a(net.norm(x)) + net.a(x))) == []


def test_what_the_caller_gets_is_in_the_callers_hands():
    net = Net(shared)
    with traced(net, [net.a]) as trace:
        net.a(net.norm(torch.randn(2, 8)))
    assert trace.groups() == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_modules_that_hide_what_they_do_end_the_search():
    net = Net(shared)
    net.hidden = torch.jit.script(nn.Linear(8, 8))
    assert groups(net) == []


def test_nothing_is_left_behind():
    net = Net(shared)
    assert groups(net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
