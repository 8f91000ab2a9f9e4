# SPDX-License-Identifier: Apache-2.0
"""quantize_ and quantized: what happens, what is kept and why, what is refused."""

import logging
import math

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from models import IDS, LINEARS, Block, model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import octavo
from octavo.nn import OurLinear, QuantLinear, StaticQuantLinear

SCHEME = octavo.Int8Dynamic()
STATIC = octavo.Int8Static(octavo.observers.MinMax())


def only_reason(module: nn.Module) -> str:
    """Why the layer `fc` of a model is kept; checks that it was left alone."""
    wrapped = nn.ModuleDict({"fc": module, "other": nn.Linear(2, 2)})
    (row,) = [row for row in octavo.quantize_(wrapped, SCHEME).rows if row.name == "fc"]
    assert row.action == "kept" and row.scheme == "" and row.bytes_after == row.bytes_before
    assert wrapped["fc"] is module
    assert isinstance(wrapped["other"], QuantLinear)
    return row.reason


# --- what happens ---------------------------------------------------------------------------------------------------


def test_every_linear_is_replaced_and_every_module_with_weights_reported():
    m = model()
    report = octavo.quantize_(m, SCHEME)
    assert [row.name for row in report.rows] == ["embedding", *LINEARS[:6], "norm", "head"]
    assert [row.name for row in report.quantized] == LINEARS
    assert all(isinstance(m.get_submodule(name), QuantLinear) for name in LINEARS)
    assert {(row.kind, row.reason) for row in report.kept} == {
        ("Embedding", "an embedding: include_embeddings=True quantizes it"),
        ("LayerNorm", "no scheme for this kind"),
    }


class Experts(nn.Module):
    """As transformers holds the experts of a mixture: one tensor, and no layers."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 4))


def test_a_class_that_holds_matrices_is_kept_with_a_remedy():
    report = octavo.quantize_(nn.Sequential(nn.Linear(4, 4), Experts(), nn.Embedding(4, 4)), SCHEME)
    assert [row.reason for row in report.kept] == [
        "no scheme for this kind: nn.Linear layers in its place would be quantized",
        "an embedding: include_embeddings=True quantizes it",
    ]


def test_output_stays_close_to_the_float_model():
    m = model()
    expected = m(IDS)
    octavo.quantize_(m, octavo.Int8WeightOnly())
    assert torch.nn.functional.cosine_similarity(m(IDS), expected, dim=-1).min() > 0.999


def test_report_bytes_are_those_of_the_model():
    def size(m):
        return sum(tensor.nbytes for tensor in [*m.parameters(), *m.buffers()])

    m = model()
    before = size(m)
    report = octavo.quantize_(m, SCHEME)
    assert (report.bytes_before, report.bytes_after) == (before, size(m))


def test_quantized_gives_the_same_bits_and_leaves_the_model_untouched():
    m = model().eval()
    before = model_state(m)
    fast = octavo.quantized(m, SCHEME)
    assert_unchanged(m, before)
    octavo.quantize_(m, SCHEME)
    assert_bits_equal(fast(IDS), m(IDS))
    shared = {p.data_ptr() for p in fast.parameters()} & {p.data_ptr() for p in m.parameters()}
    assert not shared


def test_quantized_takes_a_bare_linear_and_quantize_says_so():
    linear = nn.Linear(4, 3)
    layer = octavo.quantized(linear, octavo.Int8Dynamic)
    assert isinstance(layer, QuantLinear) and type(linear) is nn.Linear
    with pytest.raises(ValueError, match=r"layer = octavo.quantized\(layer, scheme\)"):
        octavo.quantize_(linear, SCHEME)


def test_training_flags_are_kept_and_weights_frozen():
    m = model().train()
    m.head.eval()
    octavo.quantize_(m, SCHEME)
    assert m.encoder[0].attention.training and not m.head.training
    assert not any(p.requires_grad for p in m.head.parameters())
    assert m.embedding.weight.requires_grad


def test_gradients_reach_what_lies_below():
    m = model()
    octavo.quantize_(m, SCHEME)
    m(IDS).sum().backward()
    assert m.embedding.weight.grad.any()


def test_quantizing_in_inference_mode_leaves_a_model_that_can_be_trained_through():
    m = model()
    with torch.inference_mode():
        octavo.quantize_(m, SCHEME)
    m(IDS).sum().backward()
    assert m.embedding.weight.grad.any()


def test_a_second_call_keeps_what_is_quantized_already():
    m = model()
    octavo.quantize_(m, SCHEME, include="head")
    report = octavo.quantize_(m, octavo.Int8WeightOnly())
    assert {row.name for row in report.quantized} == set(LINEARS) - {"head"}
    assert next(row.reason for row in report.kept if row.name == "head") == "already quantized"


def test_a_module_with_two_names_is_quantized_once_and_both_names_get_it():
    shared = nn.Linear(8, 8)
    m = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    report = octavo.quantize_(m, SCHEME)
    assert isinstance(m["a"], QuantLinear) and m["b"]["c"] is m["a"]
    first, second = report.rows
    assert (first.name, second.name, second.reason) == ("a", "b.c", "the same module as 'a'")
    assert second.action == "quantized" and second.bytes_before == second.bytes_after == 0


def test_a_shared_block_is_quantized_once():
    block = Block()
    m = nn.ModuleList([block, block])
    x = torch.randn(3, 8)
    fast = octavo.quantized(m, SCHEME)
    assert fast[0] is fast[1] and fast[0] is not block
    assert isinstance(fast[1].attention, QuantLinear)
    assert_bits_equal(fast[0](x), fast[1](x))


def test_a_subclass_that_keeps_forward_is_quantized():
    class Named(nn.Linear):
        pass

    report = octavo.quantize_(nn.Sequential(Named(3, 4)), SCHEME)
    assert [(row.kind, row.action) for row in report.rows] == [("Named", "quantized")]


def test_nothing_to_quantize_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "octavo"):
        octavo.quantize_(nn.Sequential(nn.LayerNorm(3)), SCHEME)
    assert "no layer was quantized" in caplog.text


def test_progress_shows_a_bar(capsys):
    octavo.quantize_(model(), SCHEME, progress=True)
    assert "quantizing" in capsys.readouterr().err
    octavo.quantize_(model(), SCHEME)
    assert capsys.readouterr() == ("", "")


# --- kept, and why --------------------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_instance_forward() -> nn.Linear:
    linear = nn.Linear(3, 4)
    linear.forward = lambda x: x
    return linear


def with_hook(register: str) -> nn.Linear:
    linear = nn.Linear(3, 4)
    getattr(linear, register)(lambda *args: None)
    return linear


def parametrized() -> nn.Linear:
    linear = nn.Linear(3, 4)
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    return linear


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize(
    "make, reason",
    [
        (OwnForward, "OwnForward has a forward of its own"),
        (lambda *_: with_instance_forward(), "Linear has a forward of its own"),
        (lambda *_: parametrized(), "parametrized"),
        (lambda *_: parametrizations.weight_norm(nn.Linear(3, 4)), "parametrized"),
        (lambda *_: prune.identity(nn.Linear(3, 4), "weight"), "its weight is no parameter"),
        (lambda *_: nn.LazyLinear(4), "not initialized yet"),
        (lambda *_: nn.Linear(3, 4).double(), "the weight is float64"),
        (lambda *_: nn.Linear(3, 4, device="meta"), "on the meta device"),
        (
            lambda *_: nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4),
            "MultiheadAttention reads its weight",
        ),
        *[(lambda *_, register=register: with_hook(register), "has hooks") for register in HOOKS],
    ],
)
def test_kept_with_the_reason(make, reason):
    assert reason in only_reason(make(3, 4))


def test_tied_weights_are_kept_and_their_partner_is_named():
    m = model()
    m.head.weight = m.embedding.weight
    report = octavo.quantize_(m, SCHEME)
    (row,) = [row for row in report.kept if row.name == "head"]
    assert row.reason == "weight is tied to embedding.weight; include_embeddings=True quantizes both"
    assert row.bytes_before == m.head.bias.nbytes  # the weight is counted at the embedding
    assert m.head.weight is m.embedding.weight


def test_two_linears_on_one_memory_are_tied_too():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = nn.Parameter(a.weight.data)
    report = octavo.quantize_(nn.ModuleDict({"a": a, "b": b}), SCHEME)
    assert [row.reason for row in report.rows] == ["weight is tied to b.weight", "weight is tied to a.weight"]


def test_views_of_one_memory_that_do_not_start_together_are_not_tied():
    """Tensors mapped from one file are such views."""
    memory = torch.randn(2, 3, 3)
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    m[0].weight, m[1].weight = nn.Parameter(memory[0]), nn.Parameter(memory[1])
    assert len(octavo.quantize_(m, SCHEME).quantized) == 2


def test_multihead_attention_keeps_working():
    m = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    report = octavo.quantize_(m, SCHEME)
    assert [row.name for row in report.quantized] == ["fc"]
    x = torch.randn(3, 1, 8)
    assert m["fc"](m["attention"](x, x, x)[0]).shape == (3, 1, 8)


# --- refusals: the model stays as it was ----------------------------------------------------------------------------


def poisoned(value: float) -> nn.Module:
    """A model with one bad value in its last layer: all others have been looked at by then."""
    m = model()
    m.head.weight.data[3, 2] = value
    return m


@pytest.mark.parametrize("convert", [octavo.quantize_, octavo.quantized])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_in_a_weight_are_refused_and_the_model_unchanged(convert, value):
    m = poisoned(value)
    before = model_state(m)
    with pytest.raises(ValueError, match="head.weight holds NaN or Inf.*exclude='head'"):
        convert(m, SCHEME)
    assert_unchanged(m, before)


def test_an_excluded_layer_may_hold_nan():
    assert len(octavo.quantize_(poisoned(math.nan), SCHEME, exclude="head").quantized) == 6


@pytest.mark.parametrize("convert", [octavo.quantize_, octavo.quantized])
@pytest.mark.parametrize("not_a_model", [None, {}, "model", nn.Linear], ids=str)
def test_only_modules_are_taken(convert, not_a_model):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        convert(not_a_model, SCHEME)


# --- data --------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A layer that no batch reaches, and one fused transformer layer whose flags conversion changes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.used, self.unused = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x):
        return self.used(self.encoder(x))


def failing_batches():
    yield torch.randn(2, 3, 12)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("convert", [octavo.quantize_, octavo.quantized])
@pytest.mark.parametrize(
    "data, error, text",
    [
        (torch.randn(2, 3, 12), ValueError, "layer 'unused' is not calibrated.*exclude='unused'"),
        (torch.randn(2, 3, 11), (AssertionError, RuntimeError), "11"),
        (3, TypeError, "data is int; a tensor, a tuple, a dict or an iterable"),
        ([], ValueError, "not calibrated"),
        (failing_batches, OSError, "disk"),
    ],
    ids=["not reached", "wrong width", "no batches", "empty", "fails"],
)
def test_after_bad_data_the_model_is_as_it_was(convert, data, error, text):
    model = Branches()
    model.encoder.eval()
    before, flag, x = model_state(model), model.encoder.activation_relu_or_gelu, torch.randn(2, 3, 12)
    with pytest.raises(error, match=text):
        convert(model, STATIC, data=data() if callable(data) else data)
    assert_unchanged(model, before)
    assert flag == model.encoder.activation_relu_or_gelu == 1
    assert not any(isinstance(module, OurLinear) for module in model.modules())
    report = octavo.quantize_(model, STATIC, data=x, exclude="unused")
    assert len(report.quantized) == 3 and model.training and not model.encoder.training


def test_data_runs_in_eval_mode_without_gradients_and_progress_shows_bars(capsys):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    model = nn.Sequential(nn.Linear(12, 5), Spy()).train()
    octavo.quantize_(model, STATIC, data=list(torch.randn(64, 12).split(16)), progress=True)
    assert seen == [(False, False)] * 4 and model.training
    assert "calibrating" in (bars := capsys.readouterr().err) and "quantizing" in bars


def test_a_bare_layer_can_be_quantized_with_data():
    layer = octavo.quantized(nn.Linear(12, 5), STATIC, data=torch.randn(3, 12))
    assert isinstance(layer, StaticQuantLinear)


def test_layers_that_were_prepared_before_see_nothing_of_the_data():
    m = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5))
    octavo.prepare_(m, octavo.Int8Dynamic(), include="1")
    octavo.prepare_(m, STATIC, include="0")
    with octavo.calibrating(m):
        m(torch.ones(1, 12))
    head = nn.Sequential(m, nn.Linear(5, 2))
    before = model_state(m)
    octavo.quantize_(head, STATIC, data=torch.full((3, 12), 7.0))
    assert_unchanged(m, before)
