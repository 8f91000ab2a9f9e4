# SPDX-License-Identifier: Apache-2.0
"""StaticQuantLinear: what it adds to QuantLinear (test_linear.py), the input's scale, in memory and in files."""

import copy

import pytest
import torch
from asserts import assert_bits_equal, assert_equal, assert_within
from torch import nn

import octavo
from octavo import reference
from octavo.nn import StaticQuantLinear
from octavo.observers import MinMax

N, K = 20, 70
X = torch.randn(5, K, generator=torch.Generator().manual_seed(0)) + 0.3


def layer(symmetric: bool = False, int32_bias: bool = False, bias: bool = True) -> StaticQuantLinear:
    torch.manual_seed(1)
    scheme = octavo.Int8Static(MinMax(), symmetric=symmetric, int32_bias=int32_bias)
    return octavo.quantized(nn.Linear(K, N, bias), scheme, data=X)


both = pytest.mark.parametrize("symmetric", [True, False])
both_biases = pytest.mark.parametrize("int32_bias", [False, True])


@both
@both_biases
def test_output_is_the_operator_of_the_reference(symmetric, int32_bias):
    static = layer(symmetric, int32_bias)
    expected = reference.linear_static(
        X,
        *reference.pack_weight(static.codes()),
        static.weight_scale.detach(),
        static.bias.detach(),
        static.input_scale.detach(),
        static.input_zero_point,
    )
    assert_bits_equal(static(X), expected)


@both
def test_the_scale_covers_what_calibration_has_seen(symmetric):
    static = layer(symmetric)
    q = octavo.choose_qparams(X, symmetric=symmetric)
    assert_bits_equal(static.input_scale.detach(), q.scale.reshape(1))
    assert_equal(static.input_zero_point, q.zero_point.reshape(1))


def test_state_dict_names_and_dtypes_are_those_of_compressed_tensors():
    """A symmetric layer has no zero point there, an affine one has int8."""
    affine, symmetric = layer(False).state_dict(), layer(True).state_dict()
    assert symmetric.keys() == {"weight", "weight_scale", "bias", "input_scale"}
    assert affine.keys() == symmetric.keys() | {"input_zero_point"}
    assert affine["input_zero_point"].dtype == torch.int8 and affine["input_scale"].dtype == torch.float32
    assert affine["input_zero_point"].shape == affine["input_scale"].shape == (1,)


@both
@both_biases
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_fills_an_unfilled_layer(symmetric, int32_bias, assign, device):
    source = layer(symmetric, int32_bias)
    if device == "meta" and not assign:
        pytest.skip("torch fills meta tensors by assigning only")
    target = StaticQuantLinear(K, N, scheme=source.scheme, device=device)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.input_zero_point.dtype == torch.int32
    assert_bits_equal(target(X), source(X))


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("input_scale", torch.ones(2), r"input_scale has shape \(2,\), QuantLinear needs \(1,\)"),
        ("input_scale", torch.ones(1, dtype=torch.int8), "input_scale is torch.int8"),
        ("input_zero_point", torch.zeros(1), "input_zero_point is torch.float32, QuantLinear needs int8"),
    ],
)
def test_a_bad_state_dict_is_refused_and_the_layer_stays(name, value, text):
    static = layer()
    expected = static(X)
    with pytest.raises(RuntimeError, match=text):
        static.load_state_dict({**static.state_dict(), name: value})
    assert_bits_equal(static(X), expected)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64)])
def test_scales_keep_their_bits_when_the_model_is_cast(cast):
    static = layer()
    cast_layer = cast(copy.deepcopy(static))
    assert_bits_equal(cast_layer.input_scale.detach(), static.input_scale.detach())
    assert_equal(cast_layer.input_zero_point, static.input_zero_point)


# --- an int32 bias ---------------------------------------------------------------------------------------------------


def test_an_int32_bias_holds_the_nearest_multiples_of_the_products_of_scales():
    exact, integer = layer(), layer(int32_bias=True)
    assert integer.bias.dtype == integer.state_dict()["bias"].dtype == torch.int32
    assert "bias=True" in repr(integer) and "bias" not in dict(integer.named_parameters())
    step = integer.input_scale.double() * integer.weight_scale.double().flatten()
    assert_within(integer.bias * step, exact.bias, step / 2)
    assert_bits_equal(integer.float_bias(), (integer.bias * step).detach())


def test_a_layer_without_bias_has_none_in_integers_either():
    static = layer(int32_bias=True, bias=False)
    assert static.bias is None and "bias" not in static.state_dict()
    assert_bits_equal(static(X), layer(bias=False)(X))


@pytest.mark.parametrize("int32_bias, needed", [(True, "int32"), (False, "float32, bfloat16, float16")])
def test_a_bias_of_the_other_kind_is_refused_and_the_layer_stays(int32_bias, needed):
    static, other = layer(int32_bias=int32_bias), layer(int32_bias=not int32_bias)
    expected = static(X)
    with pytest.raises(RuntimeError, match=f"bias is {other.bias.dtype}, QuantLinear needs {needed}"):
        static.load_state_dict(other.state_dict())
    assert_bits_equal(static(X), expected)


def test_casting_the_model_leaves_an_int32_bias_alone():
    static = layer(int32_bias=True)
    codes = static.bias.clone()
    for cast in (static.half(), static.to(torch.bfloat16), static.to(torch.float64)):
        assert_equal(cast.bias, codes)


def test_a_layer_that_got_its_int32_bias_later_is_saved_and_loaded_with_it(tmp_path):
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    quantized = octavo.quantized(model, octavo.Int8Static(MinMax(), int32_bias=True), data=X)
    octavo.correct_bias_(quantized, model, X)
    assert quantized[0].bias.dtype == torch.int32 and quantized[0].bias.any()
    octavo.save(quantized, tmp_path)
    loaded = octavo.load(tmp_path, copy.deepcopy(model).to("meta"))
    assert_equal(loaded[0].bias, quantized[0].bias)
    assert_bits_equal(loaded(X), quantized(X))
    loaded.requires_grad_(True)  # would raise if integers were Parameters


# --- gradients and graphs -------------------------------------------------------------------------------------------


def test_all_of_it_may_be_asked_for_gradients():
    static = layer().requires_grad_(True)
    x = X.clone().requires_grad_()
    static(x).sum().backward()
    assert x.grad.any() and static.bias.grad.any()
    assert static.input_scale.grad is None


def test_gradients_reach_the_input_past_an_int32_bias():
    static = layer(int32_bias=True).requires_grad_(True)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    static(x).sum().backward()
    layer()(y).sum().backward()
    assert_bits_equal(x.grad, y.grad)


@both_biases
def test_export_gives_one_operator(int32_bias):
    program = torch.export.export(
        layer(int32_bias=int32_bias), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert operators == [torch.ops.octavo.linear_static.default]


def test_compile_without_graph_breaks_gives_the_same_bits():
    static = layer()
    compiled = torch.compile(static, backend="eager", fullgraph=True)
    assert_bits_equal(compiled(X), static(X))
