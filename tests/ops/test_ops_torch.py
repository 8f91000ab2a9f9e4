# SPDX-License-Identifier: Apache-2.0
"""The operators in torch's hands: opcheck, compile, export, inference mode, autocast, gradients."""

import itertools

import pytest
import torch
from operator_arguments import (
    FLOATS,
    LINEARS,
    WHAT_TAKES_MILLISECONDS,
    assert_same_bits,
    make_weight,
    random_codes,
)
from torch.library import opcheck

from octavo import ops

# --- torch's contracts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_of_the_float_operators(dtype):
    namespace, x = torch.ops.octavo, torch.randn(3, 5).to(dtype)
    scale, zero_point = ops.choose_qparams(x, -128, 127, False)
    codes = ops.quantize(x, scale, zero_point, -128, 127, torch.int8)
    opcheck(namespace.choose_qparams.default, (x, -128, 127, False))
    opcheck(namespace.quantize.default, (x, scale, zero_point, -128, 127, torch.int8))
    opcheck(namespace.dequantize.default, (codes, scale, zero_point, dtype))


def test_opcheck_of_the_integer_operators():
    namespace, codes = torch.ops.octavo, random_codes(20, 70)
    opcheck(namespace.int8_mm.default, (codes, random_codes(70, 3)))
    opcheck(namespace.pack_weight.default, (codes,))
    opcheck(
        namespace.pack_weight_into.default, (codes, torch.empty(ops.packed_shape(20, 70), dtype=torch.int8))
    )
    opcheck(namespace.unpack_weight.default, (ops.pack_weight(codes)[0], 20, 70))


SHAPES = [(70,), (3, 70), (0, 70), (2, 3, 70)]


# Below ops/ the operator has no gradient of its own, and torch says so.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_of_the_linear_operators(linear, dtype):
    """Everything on all shapes with and without gradients, but for tracing, which takes a quarter of a second: on all
    shapes in float32, and on one shape in the other types."""
    weight = make_weight(20, 70)
    for shape, requires_grad in itertools.product(SHAPES, (False, True)):
        arguments = (torch.randn(shape).to(dtype).requires_grad_(requires_grad), *weight, *linear.options)
        opcheck(linear.op, arguments, test_utils=WHAT_TAKES_MILLISECONDS)
    traced = [(shape, True) for shape in (SHAPES if dtype == torch.float32 else SHAPES[-1:])]
    for shape, requires_grad in [*traced, (SHAPES[-1], False)]:
        x = torch.randn(shape).to(dtype).requires_grad_(requires_grad)
        opcheck(linear.op, (x, *weight, *linear.options), test_utils="test_aot_dispatch_dynamic")


def each_linear(x, weight):
    """What every linear operator gives, so that one graph holds all of them."""
    return [getattr(ops, name)(x, *weight, *options) for name, options in LINEARS.values()]


def assert_all_have_the_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compile_gives_one_graph_for_every_batch_size(mode):
    weight = make_weight(20, 70)
    torch.compiler.reset()

    def f(x):
        return [y + 1 for y in each_linear(x * 2, weight)]

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with mode():
        for m in (3, 17, 1, 64):
            x = torch.randn(m, 70)
            assert_all_have_the_same_bits(compiled(x), f(x))


def test_compile_with_inductor_changes_no_bit():
    weight, x = make_weight(20, 70), torch.randn(4, 70)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: each_linear(x, weight), fullgraph=True)
        assert_all_have_the_same_bits(compiled(x), each_linear(x, weight))


def test_compiled_gradients_are_the_eager_ones():
    """Each operator has an x of its own, so that the graph of all of them gives a gradient for each."""
    weight = make_weight(20, 70)
    torch.compiler.reset()

    def f(*xs):
        calls = zip(LINEARS.values(), xs, strict=True)
        return sum(getattr(ops, name)(x, *weight, *options).sum() for (name, options), x in calls)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 5):
        eager = [torch.randn(m, 70).requires_grad_() for _ in LINEARS]
        copies = [x.detach().clone().requires_grad_() for x in eager]
        f(*eager).backward()
        compiled(*copies).backward()
        assert_all_have_the_same_bits([x.grad for x in copies], [x.grad for x in eager])


class Layer(torch.nn.Module):
    def __init__(self, linear, weight):
        super().__init__()
        self.linear = linear
        for name, tensor in zip(("packed", "column_sum", "weight_scale", "bias"), weight, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.linear(x, self.packed, self.column_sum, self.weight_scale, self.bias)


def test_export_keeps_one_node_and_a_dynamic_batch(linear):
    layer = Layer(linear, make_weight(20, 70))
    exported = torch.export.export(
        layer, (torch.randn(4, 70),), dynamic_shapes={"x": {0: torch.export.Dim("m", min=1, max=1024)}}
    )
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [linear.op]
    x = torch.randn(9, 70)
    assert_same_bits(exported.module()(x), layer(x))


def test_inference_mode_changes_no_bit_and_makes_inference_tensors(linear):
    weight, x = make_weight(20, 70), torch.randn(3, 70)
    with torch.inference_mode():
        y = linear(x, *weight)
    assert y.is_inference()
    assert_same_bits(y.clone(), linear(x, *weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_as_it_does_for_nn_linear(linear, dtype):
    weight, x = make_weight(20, 70), torch.randn(3, 70)
    with torch.autocast("cpu", dtype=dtype):
        y = linear(x, *weight)
        assert y.dtype == torch.nn.functional.linear(x, torch.randn(20, 70)).dtype == dtype
    assert_same_bits(y, linear(x.to(dtype), *weight))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_are_those_of_the_dequantized_layer(linear, dtype):
    packed, column_sum, weight_scale, bias = make_weight(20, 70, dtype)
    x, bias = torch.randn(2, 3, 70).to(dtype).requires_grad_(), bias.requires_grad_()
    grad_y = torch.randn(2, 3, 20).to(dtype)
    linear(x, packed, column_sum, weight_scale, bias).backward(grad_y)
    weight = ops.unpack_weight(packed, 20, 70) * weight_scale
    assert_same_bits(x.grad, (grad_y.float() @ weight).to(dtype))  # the weight is not rounded to dtype
    assert_same_bits(bias.grad, grad_y.reshape(6, 20).sum(0))


def test_a_layer_without_outputs_has_gradients_of_zeros(linear):
    packed, column_sum, weight_scale, bias = make_weight(0, 8)
    for shape in [(8,), (3, 8), (0, 8), (2, 3, 8)]:
        x, b = torch.randn(shape).requires_grad_(), bias.clone().requires_grad_()
        linear(x, packed, column_sum, weight_scale, b).sum().backward()
        assert x.grad.shape == shape and not x.grad.any() and b.grad.shape == (0,), shape


def test_gradients_do_not_change_the_result(linear):
    weight, x = make_weight(20, 70), torch.randn(3, 70)
    assert_same_bits(linear(x.clone().requires_grad_(), *weight).detach(), linear(x, *weight))


def test_gradient_reaches_x_alone(linear):
    weight, x = make_weight(20, 70), torch.randn(3, 70, requires_grad=True)
    linear(x, *weight).sum().backward()
    assert x.grad is not None and all(tensor.grad is None for tensor in weight)


@pytest.mark.filterwarnings("error")
def test_a_weight_scale_marked_by_requires_grad_gets_no_gradient_and_no_warning(linear):
    packed, column_sum, weight_scale, bias = make_weight(20, 70)
    linear(torch.randn(3, 70), packed, column_sum, weight_scale.requires_grad_(), bias).sum().backward()
    assert weight_scale.grad is None


def test_nothing_asks_for_a_gradient_that_does_not_exist():
    x = torch.randn(3, 5, requires_grad=True)
    scale, zero_point = ops.choose_qparams(x, -127, 127, True)
    codes = ops.quantize(x, scale, zero_point, -127, 127, torch.int8)
    assert not scale.requires_grad
    assert not ops.dequantize(codes, scale.clone().requires_grad_(), zero_point, torch.float32).requires_grad
