# SPDX-License-Identifier: Apache-2.0
"""The Fireworks method's figures: against a plain loop over positions, and by their identities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_distribution import log_probabilities, oracle_kld, random_logits

from octavo import metrics
from octavo.metrics import ForcedAccumulator


def forced(*pieces, top_n=16):
    accumulator = ForcedAccumulator(top_n)
    for piece in pieces:
        accumulator.update(*piece)
    return accumulator.result()


@pytest.mark.parametrize("top_n", [1, 3, 16, 40, 99])
def test_every_figure_is_that_of_a_plain_loop(top_n):
    x, y = random_logits(top_n, 25, 40)
    klds, dropped, rejected = [], [], 0
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        top = sorted(range(40), key=lambda i: -a[i])[:top_n]
        klds.append(oracle_kld([a[i] for i in top], [b[i] for i in top]))
        dropped.append(1 - math.fsum(math.exp(log_probabilities(a)[i]) for i in top))
        rejected += a.index(max(a)) != b.index(max(b))
    found = forced((x, y), top_n=top_n)
    assert (found.positions, found.top_n) == (25, top_n)
    assert found.kld_top_n == pytest.approx(sum(klds) / 25, rel=1e-9, abs=1e-12)
    assert found.dropped_mass == pytest.approx(sum(dropped) / 25, abs=1e-12)
    assert found.rejection_rate == pytest.approx(rejected / 25)
    assert found.kld == metrics.kld(x, y).mean().item()


def test_the_whole_vocabulary_drops_nothing():
    x, y = random_logits(0, 9, 12)
    found = forced((x, y), top_n=12)
    assert found.kld_top_n == pytest.approx(found.kld, rel=1e-9)
    assert found.dropped_mass == pytest.approx(0, abs=1e-15)


def test_a_model_compared_with_itself_is_never_rejected():
    x, _ = random_logits(1, 30, 50)
    found = forced((x, x.clone()))
    assert (found.kld_top_n, found.kld, found.rejection_rate) == (0.0, 0.0, 0.0)


@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_batches_add_up_to_the_whole_exactly(seed, sizes):
    x, y = random_logits(seed, sum(sizes), 20)
    assert forced(*zip(x.split(sizes), y.split(sizes), strict=True)) == forced((x, y))


def test_the_mask_leaves_positions_out():
    x, y = random_logits(2, 4, 6, 20)
    mask = torch.rand(4, 6) < 0.5
    assert forced((x, y, mask)) == forced((x[mask], y[mask]))


def test_values_of_each_position_are_kept_in_order():
    x, y = random_logits(3, 8, 5)
    accumulator = ForcedAccumulator()
    accumulator.update(x[:3], y[:3])
    accumulator.update(x[3:], y[3:])
    assert accumulator.klds().tolist() == metrics.kld(x, y).tolist()
    assert accumulator.rejections().tolist() == (x.argmax(-1) != y.argmax(-1)).double().tolist()


def test_a_model_that_excludes_all_that_the_reference_wants_is_infinitely_far():
    x = torch.tensor([[9.0, 8.0, 0.0, 0.0]])
    y = torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]])
    assert forced((x, y), top_n=2).kld_top_n == math.inf
    assert forced((x, y), top_n=3).kld_top_n == math.inf


def test_nan_is_never_dropped():
    x, y = random_logits(4, 6, 30)
    y[2, 5] = math.nan
    assert math.isnan(forced((x, y), top_n=30).kld_top_n)
    assert math.isnan(forced((x, y)).kld) and math.isnan(forced((x, y)).rejection_rate)


def test_no_position_is_nan_and_no_error():
    found = forced()
    assert found.positions == 0 and math.isnan(found.kld) and math.isnan(found.rejection_rate)


def test_top_n_must_be_positive():
    with pytest.raises(ValueError, match="top_n is 0"):
        ForcedAccumulator(0)
