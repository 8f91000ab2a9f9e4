# SPDX-License-Identifier: Apache-2.0
"""PreparedLinear: its views, its gradients, and that freezing changes nothing but float rounding."""

import copy

import pytest
import torch
from asserts import assert_bits_equal, assert_equal, assert_within
from torch import nn

import octavo
from octavo.nn import PreparedLinear, QuantLinear
from octavo.observers import MinMax, Percentile
from octavo.tensors.fake_quantize import positive_scale

SCHEMES = [
    octavo.Int8WeightOnly(),
    octavo.Int8Dynamic(),
    octavo.Int8Dynamic(symmetric=False, weights=octavo.formats.CoarseInt8(4)),
    octavo.Int8Static(MinMax()),
    octavo.Int8Static(Percentile(90.0), symmetric=False),
    octavo.Int8Static(Percentile(90.0), weights=octavo.formats.CoarseInt8(4)),
    octavo.Int8Static(MinMax(), int32_bias=True),
    octavo.Int8Static(
        Percentile(90.0), symmetric=False, int32_bias=True, weights=octavo.formats.CoarseInt8(2)
    ),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(n: int = 33, k: int = 70, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias)


X = seeded(64, 70, seed=1)


def calibrated(scheme, layer: nn.Linear | None = None, x: torch.Tensor = X, **options) -> PreparedLinear:
    prepared = scheme.prepare_linear(layer or linear(), **options)
    with octavo.calibrating(prepared):
        prepared(x)
    return prepared


def rounding(prepared: PreparedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far float32 may take two ways of computing the same product apart.

    Each factor, each product and each of the k sums is rounded once on one side; the exact sum, the product of the
    scales and the fma on the other: k + 8 roundings of 2^-24 of what is summed, generously.
    """
    w, b = (t.detach().double() for t in (prepared.fake_quantized_weight(), prepared.fake_quantized_bias()))
    total = x.double().abs() @ w.abs().T + b.abs()
    return (x.shape[-1] + 8) * 2**-24 * total


# --- what freezing keeps --------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_codes_are_those_of_the_prepared_layer(scheme, learn_scales, dtype):
    prepared = calibrated(scheme, linear().to(dtype), X.to(dtype), learn_scales=learn_scales)
    for (
        name,
        parameter,
    ) in prepared.named_parameters():  # as training would, a learned scale below zero included
        with torch.no_grad():
            parameter *= -0.9 if name.endswith("_scale") else 1.1
    frozen = scheme.freeze(prepared)
    assert_equal(frozen.codes(), prepared.quantized_weight.codes)
    assert_bits_equal(frozen.dequantize(dtype), prepared.fake_quantized_weight().detach())
    if scheme.needs_data:
        q = prepared.input_qparams
        assert_bits_equal(frozen.input_scale.detach(), q.scale.reshape(1))
        assert_equal(frozen.input_zero_point, q.zero_point.reshape(1))
        assert_bits_equal(frozen.input_scale.detach(), positive_scale(prepared.input_scale))
        assert ("input_offset" in prepared.state_dict()) == (learn_scales and not scheme.symmetric)


@every_scheme
def test_the_integer_layer_reads_the_codes_that_the_fake_quantized_forward_had(scheme):
    """A layer whose weight is the identity gives back its input as it reads it: scale * (code - zero_point), rounded
    three times. Another code would be off by a whole scale, at least 1 / 255 of the value."""
    identity = nn.Linear(70, 70, bias=False)
    nn.init.eye_(identity.weight)
    prepared = calibrated(scheme, identity)
    x = 2 * X  # half of the values of a static layer are clipped
    read, fake = scheme.freeze(prepared)(x), prepared.fake_quantized_input(x).detach()
    if isinstance(scheme, octavo.Int8WeightOnly):  # its prepared layer leaves out the rounding to 16 bits
        assert_within(read, fake, x.abs().amax(1, keepdim=True) / 32512 * (1 + 2**-10) / 2)
    else:
        assert_within(read, fake, 4 * 2**-24 * fake.abs())


@every_scheme
def test_frozen_outputs_are_equal_to_float_rounding(scheme):
    prepared = calibrated(scheme)
    y, frozen_y = prepared(X).detach(), scheme.freeze(prepared)(X)
    bound = rounding(prepared, prepared.fake_quantized_input(X))
    if isinstance(scheme, octavo.Int8WeightOnly):
        half_step = X.double().abs().amax(1, keepdim=True) / 32512 / 2
        bound = bound + half_step * prepared.fake_quantized_weight().detach().double().abs().sum(1) * (
            1 + 2**-10
        )
    assert_within(frozen_y, y, bound)


@every_scheme
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_becomes_nan_and_touches_no_other(scheme, bad):
    prepared = calibrated(scheme)
    x = X.clone()
    x[3, 5] = bad
    y, expected = prepared(x).detach(), prepared(X).detach()
    if not isinstance(scheme, octavo.Int8WeightOnly):  # there, Inf stays Inf: the input is not rounded at all
        assert y[3].isnan().all()
    assert_bits_equal(torch.cat([y[:3], y[4:]]), torch.cat([expected[:3], expected[4:]]))


def test_under_autocast_codes_come_from_the_rounded_input_as_in_the_integer_layer():
    identity = nn.Linear(70, 70, bias=False)
    nn.init.eye_(identity.weight)
    scheme = octavo.Int8Static(MinMax())
    prepared = calibrated(scheme, identity)
    with torch.autocast("cpu", torch.bfloat16):
        read, fake = scheme.freeze(prepared)(X), prepared(X).detach()
    assert read.dtype == fake.dtype == torch.bfloat16
    assert_within(read, fake, 2**-8 * fake.float().abs())


# --- gradients ------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("estimator", ["clipped", "pure"])
def test_gradients_are_those_of_the_product_of_what_was_computed_with(scheme, estimator):
    prepared = calibrated(scheme, estimator=estimator)
    x = (2 * X).requires_grad_()
    y = prepared(x)
    grad_y = seeded(*y.shape, seed=2)
    y.backward(grad_y)
    fake_x, fake_w = prepared.fake_quantized_input(x).detach(), prepared.fake_quantized_weight().detach()
    inside = torch.ones_like(x, dtype=torch.bool)
    if scheme.needs_data and estimator == "clipped":
        q = prepared.input_qparams
        steps = torch.round(x.detach() * (1 / q.scale)) + q.zero_point
        inside = (steps >= -128) & (steps <= 127)
        assert 0 < inside.sum() < x.numel()
    torch.testing.assert_close(x.grad, torch.where(inside, grad_y @ fake_w, 0.0))
    torch.testing.assert_close(prepared.weight.grad, grad_y.T @ fake_x)
    torch.testing.assert_close(prepared.bias.grad, grad_y.sum(0))


def test_learned_scales_get_a_gradient_and_start_at_what_calibration_found():
    scheme = octavo.Int8Static(
        Percentile(90.0)
    )  # of 8 bits: first_weight_scale is the one that covers the row
    fixed, learned = calibrated(scheme), calibrated(scheme, learn_scales=True)
    assert_bits_equal(learned(X).detach(), fixed(X).detach())
    learned(X).square().sum().backward()
    assert learned.weight_scale.grad.shape == (33, 1) and learned.weight_scale.grad.all()
    assert learned.input_scale.grad.any()
    assert not fixed.input_scale.requires_grad


@pytest.mark.parametrize("x", [X.abs(), X - 1, X], ids=["positive", "most negative", "both"])
def test_a_learned_zero_point_starts_at_what_calibration_found_and_gets_a_gradient(x):
    scheme = octavo.Int8Static(Percentile(90.0), symmetric=False)
    fixed, learned = calibrated(scheme, x=x), calibrated(scheme, x=x, learn_scales=True)
    assert_equal(learned.input_qparams.zero_point, fixed.input_qparams.zero_point)
    assert_bits_equal(learned(x).detach(), fixed(x).detach())
    learned(x).square().sum().backward()
    assert learned.input_offset.grad.any() and learned.input_scale.grad.any()
    before = learned.input_qparams.zero_point.clone()
    with torch.no_grad():
        learned.input_offset -= 3 * learned.input_scale
    assert_equal(learned.input_qparams.zero_point, (before + 3).clamp(-128, 127))


# --- an ordinary module ---------------------------------------------------------------------------------------------


def test_scales_and_the_observed_range_stay_float32():
    prepared = calibrated(octavo.Int8Static(MinMax(), symmetric=False), learn_scales=True)
    prepared(X).sum().backward()
    before = copy.deepcopy(prepared)
    prepared.to(torch.bfloat16)
    assert prepared.weight.dtype == torch.bfloat16
    for name in ("weight_scale", "input_scale", "input_offset"):
        assert_bits_equal(getattr(prepared, name).detach(), getattr(before, name).detach())
        assert getattr(prepared, name).grad.dtype == torch.float32
    assert_bits_equal(prepared.input_observer.high, before.input_observer.high)
    assert prepared(X.bfloat16()).dtype == torch.bfloat16


def test_the_codes_of_a_frozen_layer_are_not_taken_for_a_float_weight():
    """Its names are those of a prepared layer with learned scales, and torch would copy int8 into float32."""
    scheme = octavo.Int8Dynamic()
    prepared = calibrated(scheme, learn_scales=True)
    frozen = scheme.freeze(prepared)
    assert prepared.state_dict().keys() == frozen.state_dict().keys()
    with pytest.raises(RuntimeError, match="weight is torch.int8, the codes of a frozen layer.*needs floats"):
        prepared.load_state_dict(frozen.state_dict())
    with pytest.raises(RuntimeError, match="weight is torch.float32, QuantLinear needs int8"):
        frozen.load_state_dict(prepared.state_dict())


def test_the_scheme_makes_a_packed_layer_and_leaves_the_prepared_one_alone():
    scheme = octavo.Int8Dynamic()
    prepared = calibrated(scheme).eval()
    y = prepared(X).detach()
    frozen = scheme.freeze(prepared)
    frozen.bias.data.zero_()
    assert isinstance(frozen, QuantLinear) and frozen.is_packed and not frozen.training
    assert_bits_equal(prepared(X).detach(), y)


def test_repr_tells_the_state():
    prepared = octavo.Int8Static().prepare_linear(linear())
    assert "scheme=Int8Static, estimator=clipped, learn_scales=False, not calibrated" in repr(prepared)
    assert "learn_scales=False, calibrated" in repr(calibrated(octavo.Int8Static()))


@every_scheme
def test_an_empty_batch_gives_an_empty_output_with_gradients(scheme):
    prepared = calibrated(scheme)
    y = prepared(torch.empty(0, 3, 70))
    assert y.shape == (0, 3, 33)
    y.sum().backward()
    assert not prepared.weight.grad.any()


def test_a_weight_with_nan_is_named_in_training():
    layer = calibrated(octavo.Int8Dynamic())
    layer.name = "fc"
    layer.weight.data[2, 2] = torch.nan
    with pytest.raises(ValueError, match="layer 'fc' has NaN or Inf in its weight: training has diverged"):
        layer(X)
