# SPDX-License-Identifier: Apache-2.0
"""McNemar's test: against the sum over all outcomes in exact fractions, and against scipy."""

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.metrics import mcnemar


def oracle(a: int, b: int) -> float:
    """The share of all 2^n ways to toss n fair coins that are at least as uneven as (a, b)."""
    n = a + b
    uneven = sum(comb(n, i) for i in range(n + 1) if abs(n - 2 * i) >= abs(a - b))
    return float(Fraction(uneven, 2**n))


@pytest.mark.parametrize("n", range(13))
def test_it_is_the_share_of_all_outcomes(n):
    for a in range(n + 1):
        assert mcnemar(a, n - a) == pytest.approx(oracle(a, n - a), rel=1e-12)


@given(st.integers(0, 400), st.integers(0, 400))
def test_larger_counts_too(a, b):
    # exp of a sum of lgammas, each up to 5000: 5 * 5000 * 2^-53 is below 1e-11
    assert mcnemar(a, b) == pytest.approx(oracle(a, b), rel=1e-10)
    assert mcnemar(a, b) == mcnemar(b, a) <= 1.0


@pytest.mark.parametrize("a, b", [(3, 9), (40, 21), (0, 7), (500, 610), (60_000, 61_000)])
def test_it_is_scipys_binomial_test(a, b):
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b, 0.5).pvalue, rel=1e-8)


def test_nothing_that_differs_is_no_difference():
    assert mcnemar(0, 0) == 1.0


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match="only_model is -1"):
        mcnemar(0, -1)
    with pytest.raises(TypeError, match="only_reference is float"):
        mcnemar(1.0, 2)
