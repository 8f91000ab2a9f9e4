# SPDX-License-Identifier: Apache-2.0
"""KL divergence, perplexity, flips and their like: against plain Python loops, and by their identities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import metrics
from octavo.metrics import DistributionAccumulator, distribution
from octavo.metrics.distribution import quantile

seeds = st.integers(0, 2**31 - 1)


def random_logits(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(shape, generator=generator)
    return x, x + 0.3 * torch.randn(shape, generator=generator)


def accumulated(*pieces, **options):
    accumulator = DistributionAccumulator()
    for piece in pieces:
        accumulator.update(*piece)
    return accumulator.result(**options)


# The oracle: one token at a time, in Python's own floats.


def log_probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.fsum(math.exp(value - top) for value in logits)
    return [value - top - math.log(total) for value in logits]


def oracle_kld(x: list[float], y: list[float]) -> float:
    pairs = zip(log_probabilities(x), log_probabilities(y), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs if p > -math.inf)


def oracle(x: torch.Tensor, y: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    rows = list(zip(x.tolist(), y.tolist(), targets.tolist(), strict=True))
    klds = [oracle_kld(a, b) for a, b, _ in rows]
    nll = [(-log_probabilities(a)[t], -log_probabilities(b)[t]) for a, b, t in rows]
    increase = [b - a for a, b in nll]
    delta = [math.exp(-b) - math.exp(-a) for a, b in nll]
    right = [(a.index(max(a)) == t, b.index(max(b)) == t) for a, b, t in rows]
    n = len(rows)

    def mean(values):
        return math.fsum(values) / n

    def standard_error(values):
        return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (n - 1) / n)

    return {
        "tokens": n,
        "kld": mean(klds),
        "kld_standard_error": standard_error(klds),
        "kld_median": float(np.quantile(klds, 0.5)),
        "kld_p99": float(np.quantile(klds, 0.99)),
        "kld_p999": float(np.quantile(klds, 0.999)),
        "kld_max": max(klds),
        "top1_agreement": mean([a.index(max(a)) == b.index(max(b)) for a, b, _ in rows]),
        "targets": n,
        "perplexity_reference": math.exp(mean([a for a, _ in nll])),
        "perplexity": math.exp(mean([b for _, b in nll])),
        "ln_perplexity_ratio": mean(increase),
        "ln_perplexity_ratio_standard_error": standard_error(increase),
        "accuracy_reference": mean([a for a, _ in right]),
        "accuracy": mean([b for _, b in right]),
        "flips": mean([a != b for a, b in right]),
        "only_reference_correct": sum(a and not b for a, b in right),
        "only_model_correct": sum(b and not a for a, b in right),
        "delta_p_mean": mean(delta),
        "delta_p_rms": math.sqrt(mean([d * d for d in delta])),
        "bits_per_byte_reference": mean([a for a, _ in nll]) / math.log(2) / 4,
        "bits_per_byte": mean([b for _, b in nll]) / math.log(2) / 4,
    }


@pytest.mark.parametrize("vocabulary", [2, 13])
def test_every_figure_is_that_of_a_plain_loop(vocabulary):
    x, y = random_logits(vocabulary, 60, vocabulary)
    targets = torch.randint(vocabulary, (60,))
    found = vars(accumulated((x, y, targets), bytes_per_token=4))
    for name, expected in oracle(x, y, targets).items():
        # sums of at most 60 * 13 float64 terms no larger than 30: 780 * 30 * 2^-53 is below 1e-11
        assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-11), name
    assert found["mcnemar_p"] == metrics.mcnemar(found["only_reference_correct"], found["only_model_correct"])


def test_known_values_of_two_classes():
    """P = (3/4, 1/4) and Q = (1/2, 1/2): KL is 3/4 ln(3/2) + 1/4 ln(1/2)."""
    x = torch.tensor([[3.0, 1.0]]).double().log()
    y = torch.zeros(1, 2).double()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert metrics.kld(x, y).item() == pytest.approx(expected, rel=1e-14)
    found = accumulated((x, y, torch.tensor([0])), bytes_per_token=1)
    assert found.perplexity_reference == pytest.approx(4 / 3, rel=1e-14)
    assert found.perplexity == pytest.approx(2, rel=1e-14) and found.bits_per_byte == pytest.approx(1)
    assert found.delta_p_mean == pytest.approx(-0.25) and found.delta_p_rms == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_model_compared_with_itself_differs_by_exactly_nothing(dtype):
    x = (10 * torch.randn(50, 33)).to(dtype)
    x[3, :20] = -math.inf
    found = accumulated((x, x.clone(), torch.randint(20, 33, (50,))))
    klds = [
        found.kld,
        found.kld_standard_error,
        found.kld_median,
        found.kld_p99,
        found.kld_p999,
        found.kld_max,
    ]
    assert klds == [0.0] * 6
    assert found.top1_agreement == found.mcnemar_p == 1.0
    assert found.perplexity == found.perplexity_reference and found.accuracy == found.accuracy_reference
    changes = [found.ln_perplexity_ratio, found.ln_perplexity_ratio_standard_error, found.flips]
    assert changes + [found.delta_p_mean, found.delta_p_rms] == [0.0] * 5
    assert found.only_reference_correct == found.only_model_correct == 0


@given(seeds, st.integers(1, 40), st.integers(0, 6))
def test_divergence_is_never_negative(seed, vocabulary, digits):
    x, y = random_logits(seed, 20, vocabulary)
    assert (metrics.kld(x, x + 10.0**-digits * (y - x)) >= 0).all()


@given(seeds, st.floats(-1e3, 1e3))
def test_a_constant_added_to_all_logits_changes_nothing(seed, shift):
    x, y = (logits.double() for logits in random_logits(seed, 9, 17))
    # float64 rounds the shifted logits by at most 1e3 * 2^-53 = 1.2e-13 each, and p log(p/q) moves by 2 of that
    assert metrics.kld(x, y + shift).numpy() == pytest.approx(metrics.kld(x, y).numpy(), abs=1e-12)
    assert metrics.kld(x + shift, y).numpy() == pytest.approx(metrics.kld(x, y).numpy(), abs=3e-12)


@given(seeds, st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_batches_add_up_to_the_whole_exactly(seed, sizes):
    x, y = random_logits(seed, sum(sizes), 11)
    targets = torch.randint(11, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
    targets[::7] = -100
    pieces = zip(x.split(sizes), y.split(sizes), targets.split(sizes), strict=True)
    assert str(accumulated(*pieces)) == str(
        accumulated((x, y, targets))
    )  # as text, because NaN is not itself


@pytest.mark.parametrize("chunk", [1, 33, 40])
def test_how_logits_are_cut_for_conversion_changes_nothing(chunk, monkeypatch):
    x, y = random_logits(0, 7, 11)
    whole = metrics.kld(x, y)
    monkeypatch.setattr(distribution, "CHUNK", chunk)  # one row at a time, three, three with room to spare
    assert metrics.kld(x, y).tolist() == whole.tolist()


def test_shapes_are_positions_and_vocabulary():
    x, y = random_logits(1, 2, 3, 5)
    assert metrics.kld(x, y).shape == (2, 3)
    assert metrics.kld(x[0, 0], y[0, 0]).shape == ()
    targets = torch.randint(5, (2, 3))
    assert accumulated((x, y, targets)) == accumulated((x.reshape(6, 5), y.reshape(6, 5), targets.reshape(6)))


def test_excluded_tokens_take_no_part():
    """-inf logits, as a grammar or a padded vocabulary sets them: 0 log 0 is 0."""
    x, y = random_logits(2, 8, 12)
    wide = [torch.cat([logits, torch.full((8, 4), -math.inf)], dim=1) for logits in (x, y)]
    targets = torch.randint(12, (8,))
    narrow = accumulated((x, y, targets))
    assert accumulated((*wide, targets)) == narrow
    # What only the reference excludes costs the model its share: ln of the mass it leaves.
    open_ended = torch.cat([y, torch.zeros(8, 4)], dim=1)
    left = y.double().logsumexp(-1) - open_ended.double().logsumexp(-1)
    expected = (metrics.kld(x, y) - left).numpy()
    assert metrics.kld(wide[0], open_ended).numpy() == pytest.approx(expected, rel=1e-9)
    # What only the model excludes has probability 0 there: the divergence is infinite.
    assert metrics.kld(open_ended, wide[1]).tolist() == [math.inf] * 8
    assert accumulated((open_ended, wide[1])).kld_median == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "model", "both"])
def test_logits_without_a_distribution_are_never_dropped(bad, side):
    x, y = random_logits(3, 200, 7)
    for name, logits in (("reference", x), ("model", y)):
        if side in (name, "both"):
            logits[50] = bad  # a row of -inf excludes every token
    found = accumulated((x, y, torch.zeros(200, dtype=torch.int64)))
    undefined = [found.kld, found.kld_median, found.kld_p99, found.kld_max, found.top1_agreement]
    undefined += [found.ln_perplexity_ratio, found.accuracy, found.flips, found.delta_p_rms]
    assert all(math.isnan(figure) for figure in undefined)
    assert metrics.kld(x, y).isnan().sum() == 1


def test_one_nan_among_a_vocabulary_is_enough():
    x, y = random_logits(4, 5, 7)
    y[2, 3] = math.nan
    assert metrics.kld(x, y).isnan().tolist() == [False, False, True, False, False]


def test_positions_without_target_and_without_text():
    x, y = random_logits(5, 10, 6)
    targets, mask = torch.randint(6, (10,)), torch.arange(10) < 7
    targets[:3] = -100
    found = accumulated((x, y, targets, mask))
    assert (found.tokens, found.targets) == (7, 4)
    assert found.kld == accumulated((x[:7], y[:7])).kld
    assert found.perplexity == accumulated((x[3:7], y[3:7], targets[3:7])).perplexity


def test_without_targets_what_needs_them_is_none():
    found = accumulated(random_logits(6, 4, 5))
    assert found.targets == 0 and found.perplexity is found.flips is found.bits_per_byte is None


def test_a_single_token_has_no_standard_error():
    assert math.isnan(accumulated(random_logits(7, 1, 5)).kld_standard_error)


def test_a_target_that_cannot_come_makes_perplexity_infinite():
    x, y = random_logits(8, 3, 5)
    y[1, 2] = -math.inf
    found = accumulated((x, y, torch.full((3,), 2)))
    assert found.perplexity == math.inf and math.isfinite(found.perplexity_reference)
    x[1, 2] = -math.inf  # for both: neither is worse
    assert math.isfinite(accumulated((x, y, torch.full((3,), 2))).ln_perplexity_ratio)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0, 1))
def test_quantile_is_numpys(values, share):
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    assert quantile(ordered, share) == pytest.approx(np.quantile(values, share), rel=1e-12, abs=1e-12)


def test_gradients_are_not_followed():
    x, y = random_logits(9, 4, 5)
    assert not metrics.kld(x, y.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"logits has shape \(2, 4\), reference_logits \(2, 3\)"),
        ((torch.ones(2, 3), [1.0]), TypeError, "logits is list"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3).long()), TypeError, "reference_logits is torch.int64"),
        ((torch.tensor(1.0), torch.tensor(1.0)), ValueError, "vocabulary"),
        ((torch.ones(2, 0), torch.ones(2, 0)), ValueError, "vocabulary"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), TypeError, "targets is torch.float32"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(3).long()), ValueError, r"targets has shape \(3,\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 3])), ValueError, r"targets must be in 0 \.\. 2"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, torch.ones(2)), TypeError, "mask is torch.float32"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_adds_nothing(arguments, error, message):
    accumulator = DistributionAccumulator()
    with pytest.raises(error, match=message):
        accumulator.update(*arguments)
    with pytest.raises(ValueError, match="no token yet"):
        accumulator.result()


def test_bytes_per_token_must_be_positive():
    with pytest.raises(ValueError, match="bytes_per_token is 0"):
        accumulated(random_logits(0, 2, 3), bytes_per_token=0)
