# SPDX-License-Identifier: Apache-2.0
"""torch.vmap over the operators: the bits of a loop, the gradients of autograd, forward mode, second derivatives."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from asserts import assert_bits_equal, assert_equal, assert_within
from models import every_scheme
from operator_arguments import make_weight, random_codes

import octavo
from octavo import ops

X = torch.randn(4, 3, 70, generator=torch.Generator().manual_seed(0))


def looped(function, *batched):
    return torch.stack([function(*each) for each in zip(*batched, strict=True)])


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("outer", [torch.vmap, lambda f, **_: torch.vmap(f)], ids=["moved", "nested"])
def test_linear_operators_of_a_batch(linear, activation, in_dim, outer):
    weight = make_weight(20, 70)
    function = lambda x: linear(x, *weight, activation=activation)  # noqa: E731
    if outer is torch.vmap:
        y = torch.vmap(function, in_dims=in_dim)(X.movedim(0, in_dim))
    else:
        y = torch.vmap(torch.vmap(function))(X)
    assert_bits_equal(y, function(X))


def test_a_linear_operator_of_a_batch_of_weights(linear):
    weights = [torch.stack(each) for each in zip(*(make_weight(20, 70) for _ in range(4)), strict=True)]
    assert_bits_equal(torch.vmap(linear)(X, *weights), looped(linear, X, *weights))


Q, MASK = torch.randn(4, 1, 2, 5, 16), torch.rand(4, 5, 5) > 0.3
COS, SIN = torch.rand(4, 1, 5, 16), torch.rand(4, 1, 5, 16)
WEIGHT, BIAS = torch.rand(70), torch.rand(70)
CASES = {
    "activate": (lambda x: ops.activate(x, "gelu"), X),
    "silu_mul": (ops.silu_mul, X, X + 1),
    "rms_norm": (lambda x: ops.rms_norm(x, WEIGHT, 1e-5), X),
    "add_norm": (lambda x, r: torch.stack(ops.add_norm(x, r, WEIGHT, BIAS, 1e-5)), X, X + 1),
    "rope": (lambda q, c, s: torch.cat(ops.rope(q, q, c, s)), Q, COS, SIN),
    "attention": (lambda q, m: ops.attention(q, q, q, m, precision="float32"), Q, MASK),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_other_operators_of_a_batch(case):
    function, *arguments = case
    assert_bits_equal(torch.vmap(function)(*arguments), looped(function, *arguments))


@every_case
def test_their_gradients_pass_through_a_vmap(case):
    """Without a rule they would be zero. Where a gradient is needed torch's functions compute, in batches of another
    shape: 2^-15 of the largest."""
    function, x, *others = case
    found = torch.func.grad(lambda x: torch.vmap(function)(x, *others).square().sum())(x)
    x = x.clone().requires_grad_()
    looped(function, x, *others).square().sum().backward()
    assert_within(found, x.grad, 2**-15 * x.grad.abs().amax())


def test_codes_of_a_batch():
    scale, zero_point = torch.vmap(lambda x: ops.choose_qparams(x, -127, 127, True))(X)
    for i in range(4):
        expected = ops.choose_qparams(X[i], -127, 127, True)
        assert_bits_equal(scale[i], expected[0])
        assert_equal(zero_point[i], expected[1])
    one, zero = torch.ones(3) / 8, torch.zeros(3, dtype=torch.int32)
    codes = torch.vmap(lambda x: ops.quantize(x, one, zero, -127, 127, torch.int8))(X)
    assert_equal(
        codes,
        ops.quantize(X.reshape(12, 70), one.repeat(4), zero.repeat(4), -127, 127, torch.int8).view(4, 3, 70),
    )
    values = torch.vmap(lambda c, s: ops.dequantize(c, s, zero))(codes, scale)
    assert_bits_equal(values, looped(lambda c, s: ops.dequantize(c, s, zero), codes, scale))


def test_integer_operators_of_a_batch():
    a, b = random_codes(4, 3, 70), random_codes(4, 70, 5)
    assert_equal(torch.vmap(ops.int8_mm)(a, b), looped(ops.int8_mm, a, b))
    packed, _ = torch.vmap(ops.pack_weight)(a)
    assert_equal(torch.vmap(lambda p: ops.unpack_weight(p, 3, 70))(packed), a)


# --- derivatives of linear layers -------------------------------------------------------------------------------------


def layer_of(scheme) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A frozen layer, an input, and the float weight through which its gradients go."""
    x = X.reshape(12, 70)
    layer = octavo.quantized(torch.nn.Linear(70, 20), scheme, data=[x])
    return layer, x, layer.dequantize()


def products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A bound of float32's rounding of sums of products of x and w over any axes of at most 128 elements."""
    return 256 * 2**-24 * x.abs().amax() * w.abs().amax() * 128


@every_scheme
def test_jacobians_are_the_weight_in_every_mode(scheme):
    layer, x, weight = layer_of(scheme)
    bound = 8 * 2**-24 * weight.abs()  # a smoothed layer's weight is a product
    assert_within(torch.func.jacrev(layer)(x[0]), weight, bound)
    assert_within(torch.func.jacfwd(layer)(x[0]), weight, bound)
    tangent = torch.func.jvp(layer, (x[0],), (torch.eye(70)[3],))[1]
    assert_within(tangent, weight[:, 3], bound[:, 3])
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x[0], torch.eye(70)[3]))
        assert_within(forward_ad.unpack_dual(y).tangent, weight[:, 3], bound[:, 3])
    assert_bits_equal(torch.func.jvp(layer, (x,), (x,))[0].detach(), layer(x))


@every_scheme
@pytest.mark.parametrize(
    "hessian",
    [
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
        lambda f: lambda x: torch.autograd.functional.hessian(f, x, vectorize=True),
    ],
    ids=["func", "reverse", "mixed", "autograd"],
)
def test_hessians_are_those_of_the_dequantized_layer(scheme, hessian):
    """Of sum(y^2): 2 W'W."""
    layer, x, weight = layer_of(scheme)
    found = hessian(lambda x: layer(x).square().sum())(x[0])
    assert_within(found, 2 * weight.T @ weight, 2 * products(weight, weight))


@every_scheme
@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x),
        lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(x).square().sum())(x),
    ],
    ids=["vmap(grad)", "grad(vmap)"],
)
def test_gradients_of_a_batch_are_those_of_autograd(scheme, transformed):
    layer, x, weight = layer_of(scheme)
    wanted = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(wanted).square().sum(), wanted)
    assert_within(transformed(layer, x), expected, products(layer(x), weight))


def test_autograd_reaches_through_a_vmap(linear):
    weight, x = make_weight(20, 70), X.clone().requires_grad_()
    bias = weight[3].requires_grad_()
    torch.vmap(lambda x: linear(x, *weight))(x).sum().backward()
    through_vmap = x.grad, bias.grad
    x.grad = bias.grad = None
    linear(x, *weight).sum().backward()
    assert_within(through_vmap[0], x.grad, products(torch.ones(20), x.grad / 20))
    assert_bits_equal(through_vmap[1], bias.grad)


def test_packing_in_a_transform_leaves_nothing_of_it_behind():
    layer, x, _ = layer_of(octavo.Int8Dynamic())
    lazy = octavo.nn.QuantLinear(70, 20, scheme=octavo.Int8Dynamic())
    lazy.load_state_dict(layer.state_dict())
    torch.func.grad(lambda x: lazy(x).sum())(x)
    torch.vmap(lazy)(x)
    assert_bits_equal(lazy(x), layer(x))
