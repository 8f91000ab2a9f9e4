# SPDX-License-Identifier: Apache-2.0
"""A factor moves only where nobody but the layers reads it, and the Parameters stay the ones that optimizers have."""

import threading

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from folding_models import Net, X, folded, free_tanh, quantized_in_place
from torch import nn
from torch.nn import functional as F

import octavo
from octavo.nn import QuantLinear, SmoothedLinear

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


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
    function = torch.jit.script(free_tanh)
    assert folded(Net(lambda net, x, h: function(h))) == ["b"]


def test_hooks_of_users_see_what_the_modules_around_them_give():
    net = nn.Sequential(nn.Sequential(nn.LayerNorm(8), nn.Identity()), nn.Linear(8, 8))
    for module, register in ((net[0], "register_forward_hook"), (net[0][1], "register_forward_pre_hook")):
        handle = getattr(module, register)(lambda *seen: None)
        quantized = octavo.quantized(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
        assert type(quantized[1]) is SmoothedLinear
        handle.remove()
    assert (
        type(octavo.quantized(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])[1])
        is QuantLinear
    )


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
    octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X], include="head")
    assert_bits_equal(model.inner(X).detach(), expected)


def test_what_a_wrapped_norm_gives_is_folded():
    """With one module that has weights in it, it is no model by itself."""
    model = Inner(nn.Sequential(nn.LayerNorm(8), nn.Identity()))
    octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
    assert type(model.head) is QuantLinear


def test_hidden_states_that_calibration_did_not_ask_for_stay_what_they_were():
    """The pooler reads the last norm, which is also the last hidden state and what the inner model gives."""
    transformers = pytest.importorskip("transformers")
    from tiny_models import IDS, bert

    model = bert(transformers.BertForSequenceClassification)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[-1]
        octavo.quantize_(
            model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[IDS], include="bert.pooler.dense"
        )
        assert_bits_equal(model(IDS, output_hidden_states=True).hidden_states[-1], expected)
        assert_bits_equal(model.bert(IDS).last_hidden_state, expected)


def test_a_llama_like_model_folds_what_its_layers_norms_give():
    pytest.importorskip("transformers")
    from tiny_models import IDS, llama

    model = octavo.quantized(llama(), octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[IDS])
    divide = [name for name, module in model.named_modules() if type(module) is SmoothedLinear]
    inner = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert divide == [*inner, "lm_head"]


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
    octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[x])
    assert (type(model[1]) is QuantLinear) == is_right
    if not is_right:
        assert_bits_equal(model[0](x).detach(), expected)


def test_a_group_norm_of_rows_absorbs():
    """Its channels are the last axis then."""
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Linear(8, 8))
    octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
    assert type(model[1]) is QuantLinear
