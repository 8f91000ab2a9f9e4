# SPDX-License-Identifier: Apache-2.0
"""Folding writes into the Parameters that optimizers have, into nobody else's, and takes back what was only tried."""

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from folding_models import Net, X, free_tanh, quantized_in_place
from torch import nn
from torch.nn import functional as F

import octavo
from octavo.nn import QuantLinear, SmoothedLinear

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def test_an_optimizer_made_before_calibration_trains_folded_layers():
    net = Net()
    octavo.prepare_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()))
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with octavo.calibrating(net), torch.no_grad():
        net(X)
    assert net.a.is_folded and net.b.is_folded
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    before = [p.detach().clone() for p in parameters]
    net(X).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_quantizing_in_place_keeps_the_parameters_of_norms():
    net = Net()
    weight, bias = net.norm.weight, net.norm.bias
    quantized_in_place(net)
    assert net.norm.weight is weight and net.norm.bias is bias and type(net.a) is QuantLinear


def test_a_copy_never_writes_into_the_original_not_even_for_a_moment():
    net = Net()
    versions = [p._version for p in net.parameters()]
    assert (
        type(octavo.quantized(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X]).b)
        is QuantLinear
    )
    assert [p._version for p in net.parameters()] == versions


def other_parameter(net: Net) -> nn.Module:
    other = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    other[0].weight = net.norm.weight
    return other


def other_memory(net: Net) -> nn.Module:
    other = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    other[0].weight = nn.Parameter(net.norm.weight.data)
    return other


OTHERS = {
    "the module": lambda net: nn.Sequential(net.norm, nn.Linear(8, 8)),
    "the Parameter": other_parameter,
    "the memory": other_memory,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_another_model_shares_stays_as_it_is(make):
    net = Net()
    other = make(net)
    expected = other(X).detach()
    assert quantized_in_place(net)[0] == ["b"]
    assert_bits_equal(other(X).detach(), expected)


def test_a_state_dict_that_is_kept_stays_as_it_is():
    net = Net()
    backup = net.state_dict()
    expected = {name: tensor.clone() for name, tensor in backup.items()}
    assert quantized_in_place(net)[0] == ["b"]
    for name, tensor in backup.items():
        assert_bits_equal(tensor, expected[name])


# --- trials ---------------------------------------------------------------------------------------------------------


def interrupted(self, *args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["Replay.agrees", "Divided._is_right", "powers_of_two"])
def test_an_interrupted_trial_leaves_the_model_as_it_was(monkeypatch, where):
    net = Net()
    octavo.prepare_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()))
    before = [(p, p.detach().clone()) for p in net.parameters()]
    monkeypatch.setattr(f"octavo.methods.folding.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt), octavo.calibrating(net), torch.no_grad():
        net(X)
    for parameter, (old, value) in zip(net.parameters(), before, strict=True):
        assert parameter is old
        assert_bits_equal(parameter.detach(), value)
    assert not net.a.is_smoothed and not net.b.is_smoothed


def test_an_error_after_folding_puts_the_values_of_norms_back():
    net = Net()
    net.unused = nn.Linear(8, 3)
    before = model_state(net)
    with pytest.raises(ValueError, match="layer 'unused' is not calibrated"):
        octavo.quantize_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
    assert_unchanged(net, before)


def test_one_wrong_fold_does_not_cost_the_others():
    function = torch.jit.script(free_tanh)
    blocks = [Net(lambda net, x, h: function(h)) if i == 2 else Net() for i in range(4)]
    model = octavo.quantized(
        nn.Sequential(*blocks), octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X]
    )
    kinds = [[type(block.a), type(block.b)] for block in model]
    assert kinds == [[SmoothedLinear if i == 2 else QuantLinear, QuantLinear] for i in range(4)]


def test_a_model_that_does_not_repeat_itself_shows_nothing():
    def noise(net, x, h):
        net.calls = getattr(net, "calls", 0) + 1
        return float(net.calls)

    assert quantized_in_place(Net(lambda net, x, h: 0.0 * noise(net, x, h)))[0] == ["a", "b"]
    net = Net(noise)
    octavo.quantize_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
    assert type(net.a) is type(net.b) is SmoothedLinear


def test_dropout_elsewhere_and_the_users_random_numbers_are_not_in_the_way():
    net = Net(lambda net, x, h: F.dropout(x, training=True))
    octavo.prepare_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()))
    torch.manual_seed(3)
    with octavo.calibrating(net), torch.no_grad():
        net(X)
    after = torch.rand(1)
    torch.manual_seed(3)
    F.dropout(X, training=True)
    assert_bits_equal(after, torch.rand(1))
    assert net.a.is_folded and net.b.is_folded
