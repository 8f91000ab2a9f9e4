# SPDX-License-Identifier: Apache-2.0
"""How each observer chooses: slow oracles written for reading, what a choice promises, and parity with torch.ao."""

import bisect
import math
import warnings
from collections import Counter

import pytest
import strategies
import torch
from asserts import assert_bits_equal, assert_equal, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from test_observers import CODES, batches_of, every_codes, gaussian, moderate_floats, seen
from torch.ao.quantization import observer as torch_ao

import octavo
from octavo.metrics import sqnr_db
from octavo.observers import MSE, Entropy, Histogram, MinMax, MovingAverage, Percentile
from octavo.observers.entropy import divergences
from octavo.observers.histogram import cut, cut_error
from octavo.observers.mse import squared_errors

EPS = 2.0**-52  # float64


def mixture(n, seed=0):
    """Gaussian values, of which 1 in 10,000 is 50 times as large."""
    outlier = torch.rand(n, generator=torch.Generator().manual_seed(seed + 100)) < 1e-4
    x = gaussian(n, seed=seed)
    return torch.where(outlier, 50 * x, x)


def quantized_values(x, q):
    """dequantize(quantize(x)) in float64, by rounding alone."""
    scale, zero_point = q.scale.double(), q.zero_point.double()
    steps = torch.round(x.double() / scale).clamp(q.qmin - zero_point, q.qmax - zero_point)
    return scale * steps


def rmse(x, q):
    return (quantized_values(x, q) - x.double()).square().mean().sqrt().item()


# --- the histogram --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(batches_of(strategies.finite_floats()))
def test_bins_hold_exactly_the_values_between_their_edges(batches):
    observer = seen(Entropy(bins=128), batches)
    values = [v for batch in batches for v in batch.tolist()]
    bins = observer.bins_of()
    # Below zero, bin -1 - i mirrors bin i. Both divisions are exact: the width is a power of two.
    expected = Counter(
        math.floor(v / bins.width) if v >= 0 else -1 - math.floor(-v / bins.width) for v in values
    )
    assert {bins.first + i: int(c) for i, c in enumerate(bins.counts) if c} == expected
    magnitudes = Counter(math.floor(abs(v) / bins.width) for v in values)
    assert {i: int(c) for i, c in enumerate(bins.magnitudes()) if c} == magnitudes
    assert (bins.low, bins.high) == (min(values), max(values))


@settings(max_examples=60)
@given(batches_of(strategies.finite_floats()))
def test_there_are_between_bins_and_twice_bins_up_to_the_largest_value(batches):
    bins = seen(Entropy(bins=128), batches).bins_of()
    if bins.width > 2.0**-126:
        assert 128 <= bins.largest / bins.width < 256
    else:  # the smallest width there is
        assert bins.largest / bins.width < 256
    assert math.frexp(bins.width)[0] == 0.5


def test_long_and_many_rows_are_counted_whole():
    x = gaussian(3, 100_001)
    observer = seen(Entropy(), [x], axis=0)
    assert observer.counts.sum(1).tolist() == [100_001] * 3
    assert seen(Entropy(), [x]).counts.sum() == 300_003


# --- percentile -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(moderate_floats, min_size=1, max_size=60), st.sampled_from([1, 50, 90, 99, 99.9]))
def test_percentile_is_the_order_statistic_to_one_bin(values, percentile):
    observer = seen(Percentile(percentile, bins=128), [torch.tensor(values)])
    width = observer.bins_of().width

    def smallest_holding(sorted_values, fraction):
        return sorted_values[max(math.ceil(fraction * len(values)), 1) - 1]

    _, t = observer.choose_range(*CODES[0])
    quantile = smallest_holding(sorted(map(abs, values)), percentile / 100)
    assert quantile <= t.item() <= quantile + width
    low, high = (end.item() for end in observer.choose_range(*CODES[1]))
    one_side = (1 + percentile / 100) / 2
    quantile = smallest_holding(sorted(values), one_side)
    assert quantile <= high <= quantile + width
    quantile = -smallest_holding(sorted(-v for v in values), one_side)
    assert quantile - width <= low <= quantile


def test_a_spike_at_zero_leaves_a_range_of_one_bin():
    x = torch.zeros(10_000)
    x[0] = 1.0
    low, high = seen(Percentile(99.0, bins=128), [x]).choose_range(*CODES[0])
    assert (low.item(), high.item()) == (-1 / 128, 1 / 128)


# --- MSE ------------------------------------------------------------------------------------------------------------


def squared_error_by_pieces(bins, q):
    """The mean squared error of evenly filled bins: each bin is cut where the nearest code changes.

    On a piece the error is linear and its square is a parabola, which Simpson's rule integrates exactly.
    """
    scale, zero_point = q.scale.item(), q.zero_point.item()
    borders = [scale * (i + 0.5) for i in range(q.qmin - zero_point, q.qmax - zero_point)]
    codes = [scale * i for i in range(q.qmin - zero_point, q.qmax - zero_point + 1)]
    total = 0.0
    for i, count in enumerate(bins.counts.tolist()):
        left, right = (bins.width * (bins.first + i + side) for side in (0, 1))
        cuts = [left, *(b for b in borders if left < b < right), right]
        for a, b in zip(cuts, cuts[1:], strict=False):
            code = codes[bisect.bisect(borders, (a + b) / 2)]
            simpson = (a - code) ** 2 + 4 * ((a + b) / 2 - code) ** 2 + (b - code) ** 2
            total += count * (b - a) / bins.width * simpson / 6
    return total / sum(bins.counts.tolist())


range_fractions = st.lists(st.sampled_from([0.02, 0.3, 0.7, 1.0]), min_size=2, max_size=2)


@settings(max_examples=30)
@given(batches_of(), range_fractions, st.sampled_from([*CODES, (False, 0, 15)]))
def test_squared_error_is_the_integral_over_the_bins(batches, fractions, codes):
    bins = seen(MSE(bins=128), batches).bins_of() if torch.cat(batches).any() else None
    if bins is None:
        return
    low, high = -fractions[0] * bins.largest, fractions[1] * bins.largest
    error = squared_errors(
        bins, *(torch.tensor([v], dtype=torch.float64) for v in (low, high)), *codes
    ).item()
    # |F(x)| <= x^3 / 3 for its two terms each; their difference over a width has 8 roundings of that, and a bin is
    # at least 1 / 256 of the largest value.
    bound = 256 * bins.largest**2 * 8 * EPS
    q = octavo.observers.MinMax().make()
    q.update(torch.tensor([low, high]))
    assert abs(error - squared_error_by_pieces(bins, q.qparams(*codes))) <= bound


@settings(max_examples=60)
@given(batches_of(), range_fractions, st.sampled_from(CODES))
def test_root_mean_square_error_is_known_to_one_bin(batches, fractions, codes):
    """The distance to the nearest code changes by no more than x does, and a value moves within its bin only."""
    x = torch.cat(batches)
    if not x.any():
        return
    bins = seen(MSE(bins=128), batches).bins_of()
    low, high = -fractions[0] * bins.largest, fractions[1] * bins.largest
    q = seen(MinMax(), [torch.tensor([low, high])]).qparams(*codes)
    ends = (torch.tensor([v], dtype=torch.float64) for v in (low, high))
    estimate = math.sqrt(squared_errors(bins, *ends, *codes).item())
    assert abs(estimate - rmse(x, q)) <= bins.width * (1 + 2**-20)


@every_codes
@pytest.mark.parametrize(
    "x", [gaussian(4000), mixture(20_000), gaussian(4000).relu() ** 3], ids=["normal", "mixture", "relu"]
)
def test_mse_is_at_most_two_bins_worse_than_the_best_of_the_grid(codes, x):
    observer = seen(MSE(steps=20), x.split(1000))
    low, high = seen(MinMax(), [x]).choose_range(*codes)
    best = min(
        rmse(x, seen(MinMax(), [i / 20 * torch.stack([low, high])]).qparams(*codes)) for i in range(1, 21)
    )
    assert rmse(x, observer.qparams(*codes)) <= best + 2 * observer.bins_of().width


def test_outliers_cost_minmax_far_more_than_mse():
    """4 bits: the bulk falls between two codes of min-max, and MSE keeps it. 8 bits: MSE still gains 3 dB."""
    batches = mixture(1 << 20).split(1 << 17)
    x = torch.cat(batches)

    def sqnr(config, codes):
        return sqnr_db(x, seen(config, batches).qparams(*codes).quantize(x).dequantize())

    assert sqnr(MSE(), (True, -127, 127)) > sqnr(MinMax(), (True, -127, 127)) + 3
    assert sqnr(MSE(), (True, -7, 7)) > sqnr(MinMax(), (True, -7, 7)) + 5
    for other in (Percentile(99.99), Histogram(), Entropy(), MovingAverage()):
        # No other method minimizes the error itself; 0.1 dB is what two bins may cost here.
        assert sqnr(MSE(), (True, -127, 127)) > sqnr(other, (True, -127, 127)) - 0.1


# --- entropy --------------------------------------------------------------------------------------------------------


def divergence_by_lists(counts, kept, levels):
    """KL(P || Q) as NVIDIA's pytorch-quantization computes it, bin by bin."""
    p = list(counts[:kept])
    p[-1] += sum(counts[kept:])
    level_of = [bin * levels // kept for bin in range(kept)]  # levels cut the kept bins proportionally
    q = [0.0] * kept
    for level in range(levels):
        members = [bin for bin in range(kept) if level_of[bin] == level and counts[bin] > 0]
        for bin in members:
            q[bin] = sum(counts[b] for b in members) / len(members)
    total_p, total_q = sum(p), sum(q)
    divergence = 0.0
    for count_p, count_q in zip(p, q, strict=True):
        if count_p > 0:
            divergence += (
                math.inf
                if count_q == 0
                else (count_p / total_p * math.log((count_p / total_p) / (count_q / total_q)))
            )
    return divergence


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 50, 1000]), min_size=12, max_size=40).filter(any), st.integers(2, 8)
)
def test_divergences_are_those_of_the_definition(counts, levels):
    candidates = [kept for kept in range(levels, len(counts) + 1) if any(counts[:kept])]
    if not candidates:
        return
    found = divergences(torch.tensor(counts, dtype=torch.float64), torch.tensor(candidates), levels)
    for kept, divergence in zip(candidates, found.tolist(), strict=True):
        expected = divergence_by_lists(counts, kept, levels)
        # At most 40 terms, each below 40,000 * log(40,000) before the division by the total.
        assert divergence == expected or abs(divergence - expected) <= 40 * 40_000 * 11 * 8 * EPS


def test_entropy_takes_the_smallest_divergence():
    observer = seen(Entropy(bins=128), [mixture(20_000)])
    bins = observer.bins_of()
    counts = bins.magnitudes().tolist()
    counts[0] = counts[1]  # zeros come back exactly, whatever the threshold
    divergence = {kept: divergence_by_lists(counts, kept, 128) for kept in range(128, len(counts) + 1)}
    _, t = observer.choose_range(*CODES[0])
    kept = t.item() / bins.width if t.item() < bins.largest else len(counts)
    assert divergence[kept] <= min(divergence.values()) + 1e-12


def test_entropy_uses_all_codes_for_one_sided_values():
    x = gaussian(100_000).relu() ** 3
    observer = seen(Entropy(), [x])
    (_, affine), (_, symmetric) = observer.choose_range(*CODES[1]), observer.choose_range(*CODES[0])
    assert affine > symmetric  # 256 levels up to t instead of 128


# --- histogram: torch.ao --------------------------------------------------------------------------------------------

DATA = {
    "normal": gaussian(50_000),
    "mirrored": torch.cat([gaussian(25_000), -gaussian(25_000)]),  # both ends tie
    "mixture": mixture(50_000),
    "relu": gaussian(50_000).relu(),
    "skewed": gaussian(50_000).exp() - 1,
    "laplace": gaussian(50_000) * gaussian(50_000, seed=1).abs(),
}


@pytest.mark.parametrize("name", DATA)
def test_the_cut_is_that_of_torch_ao_for_the_same_histogram(name):
    theirs = torch_ao.HistogramObserver(bins=512, dtype=torch.qint8)
    theirs(DATA[name])
    width = (theirs.max_val - theirs.min_val) / theirs.bins
    start, end = cut(theirs.histogram.double(), 256)
    low, high = theirs._non_linear_param_search()
    assert_bits_equal(theirs.min_val + width * start, low)
    assert_bits_equal(theirs.min_val + width * (end + 1), high)


@pytest.mark.parametrize("name", DATA)
def test_the_cut_s_error_is_that_of_torch_ao(name):
    theirs = torch_ao.HistogramObserver(bins=256, dtype=torch.qint8)
    theirs(DATA[name])
    width = ((theirs.max_val - theirs.min_val) / theirs.bins).item()
    for start, end in [(0, 255), (3, 200), (100, 140)]:
        ours = cut_error(theirs.histogram.double(), start, end, 256) * width**2
        # float32 distances from a level's centre are off by 4 roundings of 256 bins, against half a level; they are
        # cubed. 256 positive terms are then added.
        half_level = (end - start + 1) / 256 / 2
        rel = (3 * 4 * 256 / half_level + 256) * 2**-24
        assert ours == pytest.approx(theirs._compute_quantization_error(start, end), rel=rel)


def cut_by_single_steps(counts, codes):
    """torch.ao's search as it stands there, one quantile step at a time, but for the look at the full range."""
    cumulative = [sum(counts[: i + 1]) for i in range(len(counts))]
    start, end, smallest, alpha, beta = 0, len(counts) - 1, math.inf, 0.0, 1.0
    while alpha < beta:
        next_alpha, next_beta = alpha + 1e-5, beta - 1e-5
        left, right = start, end
        while left < end and cumulative[left] < next_alpha * cumulative[-1]:
            left += 1
        while right > start and cumulative[right] > next_beta * cumulative[-1]:
            right -= 1
        moved = (left, end) if left - start > end - right else (start, right)
        alpha, beta = (next_alpha, beta) if left - start > end - right else (alpha, next_beta)
        if moved == (start, end):
            continue
        error = cut_error(torch.tensor(counts, dtype=torch.float64), *moved, codes)
        if error > smallest:
            break
        (start, end), smallest = moved, error
    full = (0, len(counts) - 1)
    error = cut_error(torch.tensor(counts, dtype=torch.float64), *full, codes)
    return full if error <= smallest else (start, end)  # torch.ao's first cut is never compared with no cut


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from([0, 1, 1, 30, 1000, 99_999, 10**6]), min_size=4, max_size=16).filter(any),
    st.integers(2, 6),
    st.booleans(),
)
def test_leaps_of_the_search_end_where_single_steps_do(counts, codes, is_mirrored):
    counts = counts + counts[::-1] if is_mirrored else counts
    assert cut(torch.tensor(counts, dtype=torch.float64), codes) == cut_by_single_steps(counts, codes)


# --- min-max and moving average: torch.ao ---------------------------------------------------------------------------


def torch_qparams(observer, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own deprecations
        for batch in batches:
            observer(batch)
        return observer.calculate_qparams()


@pytest.mark.parametrize("symmetric, qmin, qmax", CODES)
@pytest.mark.parametrize("config", [MinMax(), MovingAverage(0.9), MovingAverage(0.99)], ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_ranges_give_the_qparams_of_torch_ao(symmetric, qmin, qmax, config, axis):
    batches = [2.0**i * gaussian(30, 5, seed=i) + 0.5 for i in range(6)]
    options = {"dtype": torch.qint8, "quant_min": qmin, "quant_max": qmax, "eps": 2**-126}
    if isinstance(config, MovingAverage):
        options["averaging_constant"] = 1 - config.momentum
    prefix = "MovingAverage" if isinstance(config, MovingAverage) else ""
    if axis is None:
        options["qscheme"] = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        theirs = getattr(torch_ao, f"{prefix}MinMaxObserver")(**options)
    else:
        options["qscheme"] = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
        theirs = getattr(torch_ao, f"{prefix}PerChannelMinMaxObserver")(ch_axis=axis, **options)
    scale, zero_point = torch_qparams(theirs, batches)
    q = seen(config, batches, axis).qparams(symmetric, qmin, qmax)
    assert_bits_equal(q.scale.reshape(-1), scale)
    assert_equal(q.zero_point.reshape(-1), zero_point.int())


# --- percentile: ONNX Runtime ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_is_that_of_onnxruntime_to_one_bin(symmetric):
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    # 61,500 values, no whole number of which is the percentile: there roundings would decide.
    batches = [gaussian(20_500, seed=i).numpy() for i in range(3)]
    theirs = calibrate.HistogramCollector("percentile", symmetric, 2048, 2048, 99.9, "same")
    for batch in batches:
        theirs.collect({"x": [batch]})
    low, high = map(float, theirs.compute_collection_result()["x"][:2])
    observer = seen(Percentile(99.9), map(torch.from_numpy, batches))
    ours = observer.choose_range(symmetric, -127, 127)
    bin_width = (
        2 * max(abs(batch).max() for batch in batches) / 2048
    )  # theirs, at most; their range grows by bins
    bound = bin_width + observer.bins_of().width
    assert_within(torch.cat(ours), torch.tensor([low, high]), bound)
