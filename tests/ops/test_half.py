# SPDX-License-Identifier: Apache-2.0
"""Weights of 16-bit floats: the bits of the reference on every ISA, within float32's rounding of the exact product."""

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from operator_arguments import FLOATS, assert_same_bits
from torch.library import opcheck

from octavo import ops, reference

HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 40, 600), (7, 33, 70), (2, 17, 0), (0, 5, 3), (13, 0, 4)]
every_half = pytest.mark.parametrize("half", HALVES, ids=str)


def weight_of(n, k, half=torch.bfloat16):
    return torch.randn(n, k).to(half)


@every_half
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_are_the_references_on_every_isa(isa, half, dtype):
    for m, n, k in SHAPES:
        x, packed, bias = torch.randn(m, k).to(dtype), ops.pack_half(weight_of(n, k, half)), torch.randn(n)
        for some_bias in (None, bias, bias.to(dtype)):
            y = ops.linear_half(x, packed, some_bias, n)
            assert_same_bits(y, reference.linear_half(x, packed, some_bias, n))
        expected = ops.activate(ops.linear_half(x.float(), packed, bias, n), "silu").to(dtype)
        assert_same_bits(ops.linear_half(x, packed, bias, n, "silu"), expected)


@every_half
def test_error_is_that_of_adding_up_in_float32(half):
    """docs/numerics.md: k roundings of partial sums, each below sum |x| |w|, and one of the bias."""
    m, n, k = 9, 40, 700
    x, weight, bias = torch.randn(m, k), weight_of(n, k, half), torch.randn(n)
    exact = x.double() @ weight.double().T + bias.double()
    products = x.double().abs() @ weight.double().abs().T
    u = 2**-24
    bound = (1 + u) * products * (k * u / (1 - k * u)) + u * exact.abs()
    assert_within(ops.linear_half(x, ops.pack_half(weight), bias, n), exact, bound)


def test_whole_numbers_are_exact():
    x, weight = torch.randint(-9, 10, (30, 500)).float(), torch.randint(-9, 10, (50, 500))
    y = ops.linear_half(x, ops.pack_half(weight.bfloat16()), None, 50)
    assert torch.equal(y, x @ weight.float().T)


@every_half
def test_packing_is_the_references_and_loses_nothing(half):
    for n, k in [(1, 1), (16, 64), (33, 67), (5, 0)]:
        for weight in (weight_of(n, k, half), weight_of(k, n, half).t(), weight_of(2 * n, k, half)[::2]):
            packed = ops.pack_half(weight)
            assert_same_bits(packed, reference.pack_half(weight))
            into = torch.empty(ops.packed_half_shape(n, k), dtype=half)
            ops.pack_half_into(weight, into)
            assert_same_bits(into, packed)
            assert_same_bits(ops.unpack_half(packed, n, k), weight.contiguous())


@every_half
def test_packing_keeps_every_bit_pattern(half):
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).reshape(256, 256)
    packed = ops.pack_half(weight.view(half))
    assert torch.equal(ops.unpack_half(packed, 256, 256).view(torch.int16), weight)


def test_nan_and_inf_are_numbers_like_any_other(isa):
    """0 * Inf is NaN, and a row of x does not touch another row."""
    x, weight = torch.ones(4, 3), torch.ones(2, 3)
    x[1, 0], x[2, 0] = torch.nan, torch.inf
    weight[1, 1], x[3, 1] = torch.inf, 0.0
    y = ops.linear_half(x, ops.pack_half(weight.half()), None, 2)
    inf, nan = torch.inf, torch.nan
    expected = torch.tensor([[3.0, inf], [nan, nan], [inf, inf], [2.0, nan]])
    assert_same_bits(y, expected)


def test_any_strides_and_batches_give_the_same_bits(isa):
    x, packed, bias = torch.randn(261, 70), ops.pack_half(weight_of(150, 70)), torch.randn(150)
    y = ops.linear_half(x, packed, bias, 150)
    for part in (1, 2, 5, 12, 100):
        pieces = [ops.linear_half(rows, packed, bias, 150) for rows in x.split(part)]
        assert_bits_equal(torch.cat(pieces), y)
    assert_bits_equal(ops.linear_half(x.t().contiguous().t(), packed, bias, 150), y)
    assert_bits_equal(ops.linear_half(x.reshape(3, 87, 70), packed, bias, 150), y.reshape(3, 87, 150))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_opcheck():
    namespace, weight = torch.ops.octavo, weight_of(20, 70)
    packed = ops.pack_half(weight)
    opcheck(namespace.pack_half.default, (weight,))
    opcheck(namespace.pack_half_into.default, (weight, torch.empty_like(packed)))
    opcheck(namespace.unpack_half.default, (packed, 20, 70))
    opcheck(
        namespace.linear_half.default,
        (torch.randn(2, 3, 70, requires_grad=True), packed, torch.rand(20), 20, 1),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_those_of_the_float_layer(dtype):
    weight, packed = weight_of(20, 70), ops.pack_half(weight_of(20, 70))
    packed = ops.pack_half(weight)
    x, bias = torch.randn(2, 3, 70).to(dtype).requires_grad_(), torch.randn(20).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 20).to(dtype)
    ops.linear_half(x, packed, bias, 20).backward(grad)
    assert_bits_equal(x.grad, grad @ weight.to(dtype))
    assert_bits_equal(bias.grad, grad.reshape(-1, 20).sum(0))


def test_forward_mode_and_vmap():
    weight, bias, x = weight_of(20, 70), torch.randn(20), torch.randn(4, 3, 70)
    packed = ops.pack_half(weight)
    f = lambda x: ops.linear_half(x, packed, bias, 20, "silu")  # noqa: E731
    assert_bits_equal(torch.vmap(f)(x), f(x))
    wanted = torch.func.grad(lambda x: f(x).sum())(x)
    assert_within(torch.func.grad(lambda x: torch.vmap(f)(x).sum())(x), wanted, wanted.abs() * 1e-5 + 1e-5)
    g = lambda x: ops.linear_half(x, packed, bias, 20)  # noqa: E731
    _, tangent = torch.func.jvp(g, (x,), (x,))
    assert_bits_equal(tangent, x @ weight.float().T)


def test_autocast_casts_x_as_it_does_for_a_linear_layer():
    x, packed = torch.randn(3, 70), ops.pack_half(weight_of(20, 70))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear_half(x, packed, None, 20)
    assert_bits_equal(y, ops.linear_half(x.bfloat16(), packed, None, 20))
