# SPDX-License-Identifier: Apache-2.0
"""Learned scales (LSQ) and zero points (LSQ+): fake quantization bit for bit, the papers' gradients and torch's own."""

import math

import pytest
import torch
from asserts import assert_bits_equal, assert_equal, assert_within
from gradients import by_row, gradients

from octavo.tensors.fake_quantize import (
    fake_quantize,
    first_weight_scale,
    lsq,
    lsq_scale,
    offset_zero_point,
    positive_scale,
)

SMALLEST_SCALE = 2.0**-126


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


# --- LSQ+: a learned offset, and so a zero point ----------------------------------------------------------------------


def lsq_plus_gradients(x, scale, offset, qmin, qmax, weights):
    """Equations of the paper in float64, with an offset of whole steps: of sum(weights * lsq(x, offset=offset)) with
    respect to x, the scale and the offset, without grad_factor."""
    s = by_row(scale.double(), x)
    zero_point = (-offset.double() / scale).round().clamp(qmin, qmax)
    v = x.double() / s + by_row(zero_point, x)
    inside = (v.round() >= qmin) & (v.round() <= qmax)
    slope = torch.where(inside, v.round() - v, v.clamp(qmin, qmax))
    by_scale = (weights.double() * slope).reshape(scale.numel(), -1).sum(1)
    by_offset = (weights.double() * ~inside).reshape(scale.numel(), -1).sum(1)
    return weights * inside, by_scale.reshape(scale.shape), by_offset.reshape(scale.shape)


@pytest.mark.parametrize("qmin, qmax", [(-128, 127), (-8, 7), (0, 255), (0, 3)])
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("steps", [-300.0, -2.4, 0.0, 1.7])
class TestLSQPlus:
    def parts(self, case, steps):
        x, scale = lsq_cases()[case]
        return x, scale, scale * steps

    def test_forward_is_fake_quantize_with_the_nearest_zero_point(self, qmin, qmax, case, steps):
        x, scale, offset = self.parts(case, steps)
        zero_point = torch.full_like(scale, min(max(round(-steps), qmin), qmax), dtype=torch.int32)
        assert_equal(offset_zero_point(scale, offset, qmin, qmax), zero_point)
        y = lsq(x, scale, qmin, qmax, offset=offset)
        assert_bits_equal(y, fake_quantize(x, scale, zero_point, qmin, qmax))

    def test_gradients_are_those_of_the_paper(self, qmin, qmax, case, steps):
        x, scale, offset = self.parts(case, steps)
        scale.requires_grad_(), offset.requires_grad_()
        grad, weights = gradients(lambda t: lsq(t, scale, qmin, qmax, offset=offset, grad_factor=0.125), x)
        expected, by_scale, by_offset = lsq_plus_gradients(
            x, scale.detach(), offset.detach(), qmin, qmax, weights
        )
        assert (grad == expected).all()
        bound = lsq_bound(x, weights, scale.detach(), qmin, qmax, 0.125)
        assert_within(scale.grad, 0.125 * by_scale, bound)
        assert_within(offset.grad, 0.125 * by_offset, bound)


@pytest.mark.parametrize("qmin, qmax", [(-128, 127), (-8, 7), (0, 255), (0, 3)])
@pytest.mark.parametrize("steps", [-2.4, 0.0])
@pytest.mark.parametrize("case", range(2))
def test_lsq_plus_gradients_are_those_of_torch_by_the_chain_rule(qmin, qmax, steps, case):
    """There the zero point z is what is learned: offset = -scale * z. (Its backward is off by a step for z < 0.)"""
    x, scale = lsq_cases()[case]
    offset = scale * steps
    zero_point = offset_zero_point(scale, offset, qmin, qmax).float().reshape(1).requires_grad_()
    theirs = scale.clone().reshape(1).requires_grad_()
    learnable = torch._fake_quantize_learnable_per_tensor_affine
    their_grad, weights = gradients(lambda t: learnable(t, theirs, zero_point, qmin, qmax, 1.0), x)
    scale.requires_grad_(), offset.requires_grad_()
    grad, _ = gradients(lambda t: lsq(t, scale, qmin, qmax, offset=offset, grad_factor=1.0), x)
    assert (grad == their_grad).all()
    bound = 4 * lsq_bound(x, weights, scale.detach(), qmin, qmax, 1.0)  # two sums in each of the two
    by_offset = -zero_point.grad / theirs.detach()
    assert_within(offset.grad.reshape(1), by_offset, bound)
    assert_within(scale.grad.reshape(1), theirs.grad + zero_point.detach() * by_offset, bound)


def test_without_an_offset_lsq_plus_is_lsq():
    x, scale = lsq_cases()[2]
    grads = []
    for offset in (None, torch.zeros(8)):
        s = scale.clone().requires_grad_()
        grads.append((gradients(lambda t, s=s, o=offset: lsq(t, s, -8, 7, offset=o), x)[0], s.grad))
    for with_none, with_zero in zip(*grads, strict=True):
        assert_bits_equal(with_zero, with_none)


def test_descent_on_scale_and_offset_finds_a_one_sided_range():
    """From a range around zero, half of which is empty, to one whose codes are used. A step of the scale moves the ends
    by 8, so its rate is divided by 64."""
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    best_symmetric = min((lsq(x, t / 7, -8, 7) - x).square().mean() for t in torch.linspace(1, 2, 99))
    scale, offset = torch.tensor(0.2), torch.tensor(0.0)
    for _ in range(300):
        scale, offset = scale.detach().requires_grad_(), offset.detach().requires_grad_()
        error = (lsq(x, scale, -8, 7, offset=offset, grad_factor=1.0) - x).square().mean()
        error.backward()
        scale, offset = scale - scale.grad / 128, offset - offset.grad / 2
    assert error < 0.75 * best_symmetric and offset > 0


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


@pytest.mark.parametrize("qmax", [1, 3, 7, 127])
def test_a_learned_weight_scale_starts_at_the_better_of_two_in_each_row(qmax):
    """Rows of Gaussians and, last, one whose outlier LSQ's scale would clip."""
    weight = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    weight[8, 0] = 1000.0
    covering, zero_point = weight.abs().amax(1) / qmax, torch.zeros(9, dtype=torch.int32)

    def error(scale):
        return (fake_quantize(weight, scale, zero_point, -qmax, qmax) - weight).square().sum(1)

    found = first_weight_scale(weight, covering, -qmax, qmax)
    paper = lsq_scale(weight, qmax, axis=0)
    assert_bits_equal(error(found), torch.minimum(error(covering), error(paper)))
    if qmax in (1, 127):  # in between some rows this way, some that
        assert_bits_equal(found[:8], (paper if qmax == 1 else covering)[:8])
    assert_bits_equal(found[8:], covering[8:])


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
        (lambda: lsq(ONE, ONE, 1, 255), ValueError, "needs qmin <= 0 < qmax.*got 1 and 255"),
        (
            lambda: lsq(ONE, ONE, -7, 7, offset=ZERO),
            ValueError,
            r"offset is torch.int32 \[1\], it must be float32",
        ),
        (
            lambda: lsq(ONE, ONE, -7, 7, offset=torch.ones(2)),
            ValueError,
            r"offset is .* scale's shape, \[1\]",
        ),
        (lambda: lsq(ONE, torch.ones(2, 2), -7, 7), ValueError, r"scale has shape \[2, 2\]"),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
