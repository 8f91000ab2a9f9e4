# SPDX-License-Identifier: Apache-2.0
"""The error figures: their identities, their values at the edges, and that streaming changes nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import metrics
from octavo.metrics import CHUNK, ErrorAccumulator

FIGURES = [metrics.sqnr_db, metrics.cosine, metrics.max_abs_error, metrics.relative_error]


def figures(reference, approximation):
    return [figure(reference, approximation) for figure in FIGURES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_equal_tensors_have_no_error(dtype):
    x = torch.randn(7, 11).mul(20).to(dtype)
    assert figures(x, x.clone()) == [math.inf, 1.0, 0.0, 0.0]


def test_known_values():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert metrics.sqnr_db(x, y) == pytest.approx(20.0)  # 25 / 0.25 = 100
    assert metrics.relative_error(x, y) == pytest.approx(0.1)
    assert metrics.max_abs_error(x, y) == 0.5
    assert metrics.cosine(x, y) == pytest.approx((9 + 18) / math.sqrt(25 * 29.25))
    assert metrics.cosine(x, -x) == -1.0


@pytest.mark.parametrize(
    "reference, approximation, expected",
    [
        (torch.zeros(3), torch.zeros(3), [math.inf, 1.0, 0.0, 0.0]),
        (torch.zeros(3), torch.ones(3), [-math.inf, 0.0, 1.0, math.inf]),
        (torch.ones(3), torch.zeros(3), [0.0, 0.0, 1.0, 1.0]),
        (torch.zeros(0), torch.zeros(0), [math.inf, 1.0, 0.0, 0.0]),
    ],
    ids=["both_zero", "zero_reference", "zero_approximation", "empty"],
)
def test_zero_and_empty_tensors_are_defined(reference, approximation, expected):
    assert figures(reference, approximation) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_value_is_never_dropped(bad):
    x = torch.ones(4)
    y = x.clone()
    y[1] = bad
    assert not any(math.isfinite(v) and v > 0 for v in [metrics.cosine(x, y), metrics.sqnr_db(x, y)])
    assert not math.isfinite(metrics.max_abs_error(x, y))
    seen_early = ErrorAccumulator()  # a later finite error must not hide it
    seen_early.update(x, y)
    seen_early.update(x, x + 7)
    assert not math.isfinite(seen_early.max_abs_error)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_streaming_in_pieces_is_the_figure_of_the_whole(pieces, length, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pieces * length, generator=generator)
    y = x + 0.01 * torch.randn(x.shape, generator=generator)
    accumulator = ErrorAccumulator()
    for a, b in zip(x.split(length), y.split(length), strict=True):
        accumulator.update(a, b)
    # float64 sums of at most 240 positive terms, in another order: 240 * 2^-53 relative, 1e-13 with room
    assert accumulator.count == x.numel()
    assert accumulator.relative_error == pytest.approx(metrics.relative_error(x, y), rel=1e-13)
    assert accumulator.sqnr_db == pytest.approx(metrics.sqnr_db(x, y), rel=1e-12)
    assert accumulator.max_abs_error == metrics.max_abs_error(x, y)


def test_long_and_strided_tensors_are_counted_whole():
    x = torch.randn(3, CHUNK // 2 + 5).t()  # longer than one chunk, not contiguous
    y = x.clone()
    y[-1, -1] += 2.0
    accumulator = ErrorAccumulator()
    accumulator.update(x, y)
    assert accumulator.count == x.numel()
    assert accumulator.max_abs_error == (x.double() - y.double()).abs().max().item()
    expected = 10 * math.log10(
        x.double().square().sum().item() / (x.double() - y.double()).square().sum().item()
    )
    assert accumulator.sqnr_db == pytest.approx(expected, rel=1e-9)


def test_scale_invariance_of_the_relative_figures():
    x, y = torch.randn(100), torch.randn(100)
    for figure in (metrics.sqnr_db, metrics.cosine, metrics.relative_error):
        assert figure(8 * x, 8 * y) == figure(x, y)  # a power of two is exact in every sum


def test_gradients_are_not_followed():
    x = torch.randn(5, requires_grad=True)
    assert metrics.sqnr_db(x, x * 2) == pytest.approx(0.0)


@pytest.mark.parametrize("figure", FIGURES)
def test_bad_input_is_named(figure):
    with pytest.raises(ValueError, match=r"approximation has shape \(3,\), reference \(2, 3\)"):
        figure(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match="reference is list"):
        figure([1.0], torch.ones(1))
    with pytest.raises(TypeError, match="approximation is torch.complex64"):
        figure(torch.ones(1), torch.ones(1, dtype=torch.complex64))
