# SPDX-License-Identifier: Apache-2.0
"""Fake quantization: the bits of the integers, the two estimators, integer biases; against float64 and torch's own."""

import functools
import math
from fractions import Fraction

import pytest
import strategies
import torch
from asserts import assert_bits_equal, assert_within
from gradients import by_row, gradients
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import ops
from octavo.tensors.fake_quantize import (
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_per_token,
    quantize_bias,
)

CODES = [(-127, 127), (-128, 127), (-7, 7), (-8, 7), (0, 255), (1, 255), (0, 15)]
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


# --- a bias of integers ---------------------------------------------------------------------------------------------


@given(strategies.tensors(shape=(5,), elements=moderate_floats), st.floats(2**-20, 2**20, width=32))
def test_codes_of_a_bias_are_the_nearest_multiples_ties_to_even(bias, input_scale):
    weight_scale = torch.tensor([[1.0], [0.5], [3.0], [0.1], [7e-3]])
    exact = [
        Fraction(b) / (Fraction(input_scale) * Fraction(w))
        for b, w in zip(bias.tolist(), weight_scale.flatten().tolist(), strict=True)
    ]
    room = 2**31 - 1 - 255 * 128 * 10
    call = functools.partial(quantize_bias, bias, torch.tensor([input_scale]), weight_scale, 10)
    if max(abs(round(code)) for code in exact) > room:
        with pytest.raises(ValueError, match=f"k = 10 leave room for {room}; use int32_bias=False"):
            call()
        return
    codes = call()
    assert codes.dtype == torch.int32
    for code, wanted in zip(codes.tolist(), exact, strict=True):
        # float64 rounds the quotient once: by 2^-53 of less than 2^31
        assert code == round(wanted) or abs(abs(code - wanted) - Fraction(1, 2)) <= Fraction(1, 2**22)


def test_ties_of_a_bias_go_to_the_even_code():
    bias = torch.tensor([0.5, 1.5, -0.5, -2.5, 2.5])
    assert quantize_bias(bias, torch.ones(1), torch.ones(5, 1), 64).tolist() == [0, 2, 0, -2, 2]


def test_a_fake_quantized_bias_is_what_its_codes_stand_for_and_passes_the_gradient():
    bias = torch.randn(6, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.3]), torch.linspace(0.01, 0.2, 6)[:, None]
    codes = quantize_bias(bias, *scales, 64)
    for dtype in (torch.float32, torch.bfloat16):
        grad, weights = gradients(lambda t: fake_quantize_bias(t, *scales, 64), bias.to(dtype))
        assert_bits_equal(grad, weights)
    step = scales[0] * scales[1].flatten()
    assert_bits_equal(fake_quantize_bias(bias, *scales, 64), codes.float() * step)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**31])
def test_a_bias_that_does_not_fit_int32_is_named(bad):
    bias = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match=r"bias\[1\] is .* k = 64 leave room for .*; use int32_bias=False"):
        quantize_bias(bias, torch.ones(1), torch.ones(2, 1), 64)


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
        (lambda: fake_quantize_per_token(torch.tensor(1.0)), ValueError, "no axis"),
        (lambda: fake_quantize_per_token(ONE.double()), TypeError, "float64"),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_groups_of_a_row_are_quantized_as_rows_of_their_own():
    x = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3] = torch.nan
    y = fake_quantize_per_token(x, True, 32)
    assert y[1, 2].isnan().all() and y.isnan().sum() == 70
    for begin in (0, 32, 64):
        part = slice(begin, begin + 32)
        assert_bits_equal(y[0, :, part], fake_quantize_per_token(x[0, :, part]))
    assert_bits_equal(fake_quantize_per_token(x, True, 96), fake_quantize_per_token(x))
