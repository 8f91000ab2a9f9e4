# SPDX-License-Identifier: Apache-2.0
"""Fake quantization: the bits of the integers, the two estimators, LSQ; against float64 oracles and torch's own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
import strategies
from asserts import assert_bits_equal, assert_within
from octavo import ops
from octavo.fake_quantize import (
    fake_quantize,
    fake_quantize_per_token,
    lsq,
    lsq_scale,
    positive_scale,
)

CODES = [(-127, 127), (-128, 127), (-7, 7), (-8, 7), (0, 255), (1, 255), (0, 15)]
SMALLEST_SCALE = 2.0**-126
moderate_floats = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40, allow_subnormal=False)


@st.composite
def cases(draw, dtypes=strategies.FLOAT_TYPES):
    """x [4, 6], scale [] or [1] or [4], zero_point, qmin, qmax; some of x outside the range."""
    x = draw(strategies.tensors(shape=(4, 6), dtypes=dtypes, elements=moderate_floats))
    qmin, qmax = draw(st.sampled_from(CODES))
    shape = draw(st.sampled_from([(), (1,), (4,)]))
    largest = x.float().abs().amax(1) if shape == (4,) else x.float().abs().amax().expand(shape)
    # As choose_qparams does: a scale is a normal number, which these are after the division.
    largest = torch.where(largest < 400 * torch.finfo(torch.float32).tiny, 1.0, largest)
    scale = largest / 100 * draw(st.sampled_from([0.25, 1.0, 3.0, 20.0]))
    zero_point = torch.full(shape, draw(st.integers(qmin, qmax)), dtype=torch.int32)
    return x, scale, zero_point, qmin, qmax


def gradients(function, x, *others):
    """Of sum(weights * function(x, *others)) with respect to x and every other tensor that wants one."""
    x = x.detach().clone().requires_grad_()
    y = function(x, *others)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (weights * y).sum().backward()
    return x.grad, weights


def by_row(values, x):
    """A scale (or zero point) of shape [], [1] or [rows], to be broadcast with x."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


# --- forward --------------------------------------------------------------------------------------------------------


@given(cases())
def test_forward_has_the_bits_of_quantize_and_dequantize(case):
    x, scale, zero_point, qmin, qmax = case
    granularity = octavo.PerChannel(0) if scale.shape == (4,) else octavo.PerTensor()
    shape = granularity.qparams_shape(x.shape)
    qparams = octavo.QParams(scale.reshape(shape), zero_point.reshape(shape), qmin, qmax, granularity)
    expected = qparams.quantize(x).dequantize(x.dtype)
    for estimator in ("clipped", "pure"):
        for t in (x, x.clone().requires_grad_()):
            assert_bits_equal(
                fake_quantize(t, scale, zero_point, qmin, qmax, estimator=estimator).detach(), expected
            )


@given(cases())
def test_forward_is_idempotent(case):
    x, *options = case
    y = fake_quantize(x.float(), *options)
    assert_bits_equal(fake_quantize(y, *options), y)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()])
def test_tensors_without_rows_or_axes(shape):
    x = torch.ones(shape, requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -127, 127)
    y.sum().backward()
    assert y.shape == x.grad.shape == torch.Size(shape)


def test_strides_do_not_matter():
    x = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(0)).transpose(0, 2)[::2]
    options = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int32), -7, 7
    assert_bits_equal(fake_quantize(x, *options), fake_quantize(x.contiguous(), *options))
    grad, weights = gradients(lambda t: fake_quantize(t, *options), x)
    assert_bits_equal(grad, gradients(lambda t: fake_quantize(t, *options), x.contiguous())[0])


# --- the two estimators ---------------------------------------------------------------------------------------------


@given(cases())
def test_the_pure_estimator_passes_every_gradient(case):
    x, *options = case
    grad, weights = gradients(lambda t: fake_quantize(t, *options, estimator="pure"), x)
    assert_bits_equal(grad, weights)


@given(cases(dtypes=(torch.float32,)))
def test_the_clipped_estimator_stops_the_gradient_where_a_code_is_clipped(case):
    x, scale, zero_point, qmin, qmax = case
    grad, weights = gradients(lambda t: fake_quantize(t, scale, zero_point, qmin, qmax), x)
    code = x.double() / by_row(scale.double(), x) + by_row(zero_point, x)
    inside = (code >= qmin - 0.5) & (code <= qmax + 0.5)
    # float32 rounds 1 / scale and the product: 2 roundings of a code below 512 near the two borders
    decided = ((code - qmin + 0.5).abs() > 2**-13) & ((code - qmax - 0.5).abs() > 2**-13)
    assert (grad == torch.where(inside, weights, 0.0))[decided].all()


@given(cases(dtypes=(torch.float32,)))
def test_the_clipped_estimator_is_that_of_torch_bit_for_bit(case):
    x, scale, zero_point, qmin, qmax = case
    if scale.shape == (4,):
        theirs, _ = gradients(
            lambda t: torch.fake_quantize_per_channel_affine(t, scale, zero_point, 0, qmin, qmax), x
        )
    else:
        theirs, _ = gradients(
            lambda t: torch.fake_quantize_per_tensor_affine(
                t, scale.reshape(1), zero_point.reshape(1), qmin, qmax
            ),
            x,
        )
    grad, _ = gradients(lambda t: fake_quantize(t, scale, zero_point, qmin, qmax), x)
    assert (grad == theirs).all()


def test_scale_gets_no_gradient():
    scale = torch.tensor([0.1], requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    fake_quantize(x, scale, torch.zeros(1, dtype=torch.int32), -127, 127).sum().backward()
    assert scale.grad is None


# --- per token ------------------------------------------------------------------------------------------------------


@given(strategies.tensors(shape=(2, 3, 5)), st.booleans())
def test_per_token_values_are_those_of_the_dynamic_layer_s_codes(x, symmetric):
    q = octavo.quantize(x, dtype=torch.uint8, granularity=octavo.PerToken(), symmetric=symmetric)
    assert_bits_equal(fake_quantize_per_token(x, symmetric), q.dequantize(x.dtype))
    grad, weights = gradients(lambda t: fake_quantize_per_token(t, symmetric), x)
    assert_bits_equal(grad, weights)


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_token_values_multiply_to_what_linear_dynamic_gives(symmetric):
    """An identity weight has codes 127 and the scale 1 / 127: the layer's output is its quantized input."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    packed, column_sum = ops.pack_weight(127 * torch.eye(16).to(torch.int8))
    y = ops.linear_dynamic(x, packed, column_sum, torch.full((16, 1), 1 / 127), None, symmetric)
    # y = fl(127 code fl(scale / 127)): two roundings more
    assert_within(y, fake_quantize_per_token(x, symmetric), 2**-22 * y.abs())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_with_nan_or_inf_is_nan_and_touches_no_other(bad):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize_per_token(x)
    x[2, 3] = bad
    y = fake_quantize_per_token(x)
    assert y[2].isnan().all()
    assert_bits_equal(y[[0, 1, 3]], expected[[0, 1, 3]])


# --- LSQ ------------------------------------------------------------------------------------------------------------


def lsq_gradients(x, scale, qmin, qmax, grad_factor, weights):
    """Equations 3 and 5 of the paper in float64: of sum(weights * lsq(x)) with respect to x and the scale."""
    v = x.double() / by_row(scale.double(), x)
    inside = (v.round() >= qmin) & (v.round() <= qmax)
    slope = torch.where(inside, v.round() - v, v.clamp(qmin, qmax))
    by_scale = (weights.double() * slope).reshape(scale.numel(), -1).sum(1) * grad_factor
    return weights * inside, by_scale.reshape(scale.shape)


def lsq_bound(x, weights, scale, qmin, qmax, grad_factor):
    """Of n terms, each |weight| * |slope| <= |weight| (qmax - qmin): n + 8 float32 roundings of their sum."""
    n = x.numel() // scale.numel()
    sums = weights.abs().double().reshape(scale.numel(), -1).sum(1).reshape(scale.shape)
    return sums * (qmax - qmin) * grad_factor * (n + 8) * 2**-23


def lsq_cases(seed=0):
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(seed))
    return [(x, torch.tensor(0.02)), (x, torch.tensor([0.3])), (x, torch.linspace(0.01, 1, 8))]


@pytest.mark.parametrize("qmin, qmax", [(-127, 127), (-8, 7), (-2, 1), (0, 255), (0, 3)])
@pytest.mark.parametrize("case", range(3))
class TestLSQ:
    def test_forward_is_fake_quantize(self, qmin, qmax, case):
        x, scale = lsq_cases()[case]
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        assert_bits_equal(lsq(x, scale, qmin, qmax), fake_quantize(x, scale, zero_point, qmin, qmax))

    def test_gradients_are_those_of_the_paper(self, qmin, qmax, case):
        x, scale = lsq_cases()[case]
        scale.requires_grad_()
        grad, weights = gradients(lambda t: lsq(t, scale, qmin, qmax), x)
        grad_factor = 1 / math.sqrt(x.numel() / scale.numel() * qmax)
        expected, by_scale = lsq_gradients(x, scale.detach(), qmin, qmax, grad_factor, weights)
        assert (grad == expected).all()
        assert_within(scale.grad, by_scale, lsq_bound(x, weights, scale, qmin, qmax, grad_factor))

    def test_gradients_are_those_of_torch(self, qmin, qmax, case):
        x, scale = lsq_cases()[case]
        grad_factor = 0.125
        ours, theirs = (scale.clone().requires_grad_() for _ in range(2))
        grad, weights = gradients(lambda t: lsq(t, ours, qmin, qmax, grad_factor=grad_factor), x)
        flat, zeros = theirs.reshape(-1), torch.zeros(scale.numel())
        if scale.numel() == 1:
            learnable = torch._fake_quantize_learnable_per_tensor_affine
            their_grad, _ = gradients(lambda t: learnable(t, flat, zeros, qmin, qmax, grad_factor), x)
        else:
            learnable = torch._fake_quantize_learnable_per_channel_affine
            their_grad, _ = gradients(lambda t: learnable(t, flat, zeros, 0, qmin, qmax, grad_factor), x)
        assert (grad == their_grad).all()
        # each within the bound of the exact sum
        bound = 2 * lsq_bound(x, weights, scale, qmin, qmax, grad_factor)
        assert_within(ours.grad, theirs.grad, bound)


@pytest.mark.parametrize("value", [-0.1, 0.0, -0.0, 1e-45, -1e-45])
def test_a_scale_that_is_not_positive_still_computes_and_learns(value):
    x = torch.tensor([0.31, -0.52, 5.0])
    scale = torch.tensor([value], requires_grad=True)
    positive = positive_scale(scale)
    assert positive.item() == max(scale.abs().item(), SMALLEST_SCALE)
    y = lsq(x, scale, -7, 7)
    assert_bits_equal(y.detach(), lsq(x, positive, -7, 7))
    y.sum().backward()
    mirrored = positive.clone().requires_grad_()
    lsq(x, mirrored, -7, 7).sum().backward()
    assert scale.grad.item() == mirrored.grad.item() * (-1 if value < 0 else 1) != 0


def test_half_precision_learns_a_float32_scale():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    scale = lsq_scale(x, 7).requires_grad_()
    lsq(x, scale, -7, 7).sum().backward()
    assert (x.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float32)


def test_the_first_scale_is_that_of_the_paper():
    x = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    assert_bits_equal(lsq_scale(x, 4), torch.tensor([1.25]))  # 2 * 1.25 / sqrt(4)
    assert_bits_equal(lsq_scale(x, 4, axis=0), torch.tensor([2.0, 0.5]))
    assert_bits_equal(lsq_scale(x, 4, axis=1), torch.tensor([0.75, 1.75]))
    assert_bits_equal(lsq_scale(torch.zeros(2, 3), 4, axis=0), torch.ones(2))


def test_descent_on_the_scale_lowers_the_error():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale, errors = lsq_scale(x, 7), []
    for _ in range(20):
        scale = scale.detach().requires_grad_()
        error = (lsq(x, scale, -7, 7) - x).square().mean()
        error.backward()
        errors.append(error.item())
        scale = scale - 0.05 * scale.grad
    assert errors[-1] < errors[0]


# --- refusals -------------------------------------------------------------------------------------------------------

ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: fake_quantize(ONE, ONE, ZERO, -7, 7, estimator="ste"),
            ValueError,
            "estimator is 'ste'.*'pure'",
        ),
        (lambda: fake_quantize([1.0], ONE, ZERO, -7, 7), TypeError, "x is list, accepted are"),
        (lambda: fake_quantize(ONE.double(), ONE, ZERO, -7, 7), TypeError, "x is torch.float64"),
        (lambda: fake_quantize(ONE, ONE.bfloat16(), ZERO, -7, 7), TypeError, "scale is torch.bfloat16"),
        (
            lambda: fake_quantize(torch.ones(3, 2), torch.ones(2), ZERO, -7, 7),
            ValueError,
            r"scale has shape \[2\], x of shape \[3, 2\] takes \[\], \[1\] or \[3\]",
        ),
        (
            lambda: fake_quantize(torch.ones(3, 2), torch.ones(3), ZERO, -7, 7),
            ValueError,
            r"zero_point has shape \[1\], it must be that of scale, \[3\]",
        ),
        (
            lambda: fake_quantize(torch.tensor(1.0), torch.ones(2), ZERO, -7, 7),
            ValueError,
            r"takes \[\], \[1\]$",
        ),
        (lambda: fake_quantize(ONE, ONE, ZERO, -200, 7), ValueError, "qmin"),
        (lambda: lsq(ONE, ONE, 1, 255), ValueError, "needs qmin <= 0 < qmax.*got 1 and 255"),
        (lambda: lsq(ONE, torch.ones(2, 2), -7, 7), ValueError, r"scale has shape \[2, 2\]"),
        (lambda: fake_quantize_per_token(torch.tensor(1.0)), ValueError, "no axis"),
        (lambda: fake_quantize_per_token(ONE.double()), TypeError, "float64"),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
