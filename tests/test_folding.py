# SPDX-License-Identifier: Apache-2.0
"""A factor moves only where nobody but the layers reads it, and the Parameters stay the ones that optimizers have."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import octavo
import octavo.folding
from asserts import assert_bits_equal, assert_unchanged, assert_within, model_state
from octavo.nn import QuantLinear, SmoothedLinear

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 1, 20, 1, 1, 0.1, 1])


class Net(nn.Module):
    """norm -> a -> ReLU -> b, and whatever `use` does with the model, its input and the norm's output."""

    def __init__(self, use=lambda net, x, h: 0.0, setup=lambda net: None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.normal_()
        self.use = use
        setup(self)

    def forward(self, x):
        h = self.norm(x)
        return self.b(F.relu(self.a(h))) + self.use(self, x, h)


def folded(net: nn.Module) -> list[str]:
    """The layers that get smoothed input, after prepare_ and a calibration that must not change the float output."""
    expected = net(X).detach()
    octavo.prepare_(net, octavo.SmoothQuant())
    for _ in range(2):
        with octavo.calibrating(net), torch.no_grad():
            found = net(X)
    # rounding of s, of the weights and of three sums of 8: 2^-23 for each of some 30 numbers
    assert_within(found, expected, 2**-18 * expected.abs().max().item())
    return [name for name in "ab" if getattr(net, name).is_folded]


def quantized_in_place(net: nn.Module) -> tuple[list[str], float]:
    """The layers that get smoothed input, and how far the outputs are from float, dB."""
    with torch.no_grad():
        expected = net(X)
        octavo.quantize_(net, octavo.SmoothQuant(), data=[X])
        error = octavo.metrics.sqnr_db(expected, net(X))
    return [name for name in "ab" if type(getattr(net, name)) is QuantLinear], error


def test_without_another_reader_both_are_folded():
    assert folded(Net()) == ["a", "b"]
    assert quantized_in_place(Net())[0] == ["a", "b"]


# --- readers of the output ------------------------------------------------------------------------------------------


def in_thread(use):
    """`use`, called in another thread."""

    def call(net, x, h):
        result = []
        thread = threading.Thread(target=lambda: result.append(use(net, x, h)))
        thread.start()
        thread.join()
        return result[0]

    return call


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * h


def scripted(code: str):
    with pytest.warns(DeprecationWarning):
        return torch.jit.CompilationUnit(f"def f(h, w):\n    return {code}").f


def keep(net, x, h):
    net.last = h
    return 0.0


def collect(net, x, h):
    net.__dict__.setdefault("all", []).append(h)
    return 0.0


def close_over(net, x, h):
    net.get_last = lambda: h
    return 0.0


READERS = {
    "in another thread": in_thread(lambda net, x, h: h.tanh()),
    "in another thread, without autograd": in_thread(
        lambda net, x, h: torch.from_numpy(h.detach().numpy() + 1)
    ),
    "a custom autograd function": lambda net, x, h: Square.apply(h),
    "detached": lambda net, x, h: h.detach() + 1,
    "its data": lambda net, x, h: h.data * 2,
    "kept in an attribute": keep,
    "collected in a list": collect,
    "kept by a closure": close_over,
    "compiled": lambda net, x, h: torch.compile(torch.tanh, backend="eager")(h),
}


@pytest.mark.parametrize("use", READERS.values(), ids=READERS)
def test_a_norm_whose_output_is_read_is_left_alone(use):
    assert folded(Net(use)) == ["b"]
    net = Net(use)
    layers, error = quantized_in_place(net)
    assert layers == ["b"] and error > 40


def test_a_scripted_function_is_not_seen_but_found():
    function = torch.jit.script(lambda_free_tanh)
    assert folded(Net(lambda net, x, h: function(h))) == ["b"]


def lambda_free_tanh(h: torch.Tensor) -> torch.Tensor:
    return torch.tanh(h).sum(-1, keepdim=True)


def test_hooks_of_users_see_what_the_modules_around_them_give():
    net = nn.Sequential(nn.Sequential(nn.LayerNorm(8), nn.Identity()), nn.Linear(8, 8))
    for module, register in ((net[0], "register_forward_hook"), (net[0][1], "register_forward_pre_hook")):
        handle = getattr(module, register)(lambda *seen: None)
        quantized = octavo.quantized(net, octavo.SmoothQuant(), data=[X])
        assert type(quantized[1]) is SmoothedLinear
        handle.remove()
    assert type(octavo.quantized(net, octavo.SmoothQuant(), data=[X])[1]) is QuantLinear


# --- readers of the weights -----------------------------------------------------------------------------------------


def free_linear(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(h, w)


def alias(of: str, make):
    """Keeps what `make` makes of the weight of `of` beside the model's Parameters."""
    return lambda net: net.__dict__.update(kept=make(getattr(net, of).weight))


WEIGHTS = {
    "a's, by a function": (lambda net, x, h: F.linear(x, net.a.weight), None, []),
    "a's, by a scripted function": (
        lambda net, x, h: torch.jit.script(free_linear)(x, net.a.weight),
        None,
        [],
    ),
    "a's, in another thread": (in_thread(lambda net, x, h: F.linear(x, net.a.weight)), None, []),
    "a's forward": (lambda net, x, h: net.a.forward(x), None, []),
    "a, in another thread": (in_thread(lambda net, x, h: net.a(x)), None, []),
    "a, functionally": (
        lambda net, x, h: torch.func.functional_call(net.a, dict(net.a.named_parameters()), (x,)),
        None,
        [],
    ),
    "the norm's": (lambda net, x, h: x * net.norm.weight, None, ["b"]),
    "the norm's, in another thread": (in_thread(lambda net, x, h: x * net.norm.weight), None, ["b"]),
    "the norm's, one by one": (lambda net, x, h: sum(p.sum() for p in net.norm.parameters()), None, ["b"]),
    "a view of the norm's": (lambda net, x, h: x * net.kept, alias("norm", lambda w: w.data), ["b"]),
    "an array of the norm's": (
        lambda net, x, h: x * torch.from_numpy(net.kept),
        alias("norm", lambda w: w.detach().numpy()),
        ["b"],
    ),
    "a list with the norm's": (lambda net, x, h: x * net.kept[0], alias("norm", lambda w: [w]), ["b"]),
}


@pytest.mark.parametrize("use, setup, expected", WEIGHTS.values(), ids=WEIGHTS)
def test_a_layer_whose_weight_is_read_is_left_alone(use, setup, expected):
    setup = setup or (lambda net: None)
    assert folded(Net(use, setup)) == expected
    layers, error = quantized_in_place(Net(use, setup))
    assert layers == expected and error > 40
    net = Net(use, setup)
    output = net(X).detach()
    octavo.equalize_(net, X)
    assert_within(net(X).detach(), output, 2**-18 * output.abs().max().item())


# --- what a model can return ----------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A model by itself, whose output is that of its norm, and a head that reads it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.inner(x))


@pytest.mark.parametrize(
    "last", [nn.LayerNorm(8), nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Dropout())], ids=str
)
def test_what_an_inner_model_gives_stays_what_it_was(last):
    torch.manual_seed(0)
    model = Inner(nn.Sequential(nn.Linear(8, 8), nn.GELU(), last)).eval()
    expected = model.inner(X).detach()
    octavo.quantize_(model, octavo.SmoothQuant(), data=[X], include="head")
    assert_bits_equal(model.inner(X).detach(), expected)


def test_what_a_wrapped_norm_gives_is_folded():
    """With one module that has weights in it, it is no model by itself."""
    model = Inner(nn.Sequential(nn.LayerNorm(8), nn.Identity()))
    octavo.quantize_(model, octavo.SmoothQuant(), data=[X])
    assert type(model.head) is QuantLinear


# --- axes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, is_right",
    [
        (nn.GroupNorm(2, 8), False),
        (nn.BatchNorm1d(8, track_running_stats=False), False),
        (nn.LayerNorm(8), True),
    ],
    ids=str,
)
def test_a_norm_that_scales_another_axis_of_the_same_size_absorbs_nothing(norm, is_right):
    x = X.reshape(4, 8, 8)
    model = nn.Sequential(norm, nn.Linear(8, 8))
    expected = model[0](x).detach()
    octavo.quantize_(model, octavo.SmoothQuant(), data=[x])
    assert (type(model[1]) is QuantLinear) == is_right
    if not is_right:
        assert_bits_equal(model[0](x).detach(), expected)


def test_a_group_norm_of_rows_absorbs():
    """Its channels are the last axis then."""
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Linear(8, 8))
    octavo.quantize_(model, octavo.SmoothQuant(), data=[X])
    assert type(model[1]) is QuantLinear


# --- optimizers and other models ------------------------------------------------------------------------------------


def test_an_optimizer_made_before_calibration_trains_folded_layers():
    net = Net()
    octavo.prepare_(net, octavo.SmoothQuant())
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
    assert type(octavo.quantized(net, octavo.SmoothQuant(), data=[X]).b) is QuantLinear
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
    octavo.prepare_(net, octavo.SmoothQuant())
    before = [(p, p.detach().clone()) for p in net.parameters()]
    monkeypatch.setattr(f"octavo.folding.{where}", interrupted)
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
        octavo.quantize_(net, octavo.SmoothQuant(), data=[X])
    assert_unchanged(net, before)


def test_one_wrong_fold_does_not_cost_the_others():
    function = torch.jit.script(lambda_free_tanh)
    blocks = [Net(lambda net, x, h: function(h)) if i == 2 else Net() for i in range(4)]
    model = octavo.quantized(nn.Sequential(*blocks), octavo.SmoothQuant(), data=[X])
    kinds = [[type(block.a), type(block.b)] for block in model]
    assert kinds == [[SmoothedLinear if i == 2 else QuantLinear, QuantLinear] for i in range(4)]


def test_a_model_that_does_not_repeat_itself_shows_nothing():
    def noise(net, x, h):
        net.calls = getattr(net, "calls", 0) + 1
        return float(net.calls)

    assert quantized_in_place(Net(lambda net, x, h: 0.0 * noise(net, x, h)))[0] == ["a", "b"]
    net = Net(noise)
    octavo.quantize_(net, octavo.SmoothQuant(), data=[X])
    assert type(net.a) is type(net.b) is SmoothedLinear


def test_dropout_elsewhere_and_the_users_random_numbers_are_not_in_the_way():
    net = Net(lambda net, x, h: F.dropout(x, training=True))
    octavo.prepare_(net, octavo.SmoothQuant())
    torch.manual_seed(3)
    with octavo.calibrating(net), torch.no_grad():
        net(X)
    after = torch.rand(1)
    torch.manual_seed(3)
    F.dropout(X, training=True)
    assert_bits_equal(after, torch.rand(1))
    assert net.a.is_folded and net.b.is_folded
