# SPDX-License-Identifier: Apache-2.0
"""Histogram: cut quantiles off both ends as long as the estimated error falls, as torch.ao's HistogramObserver does."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from .binned import BinnedConfig, Bins

_QUANTILE_STEP = 1e-5


@dataclass(frozen=True)
class Histogram(BinnedConfig):
    """Starts from the full range and moves the end with more empty bins inward, a quantile of 1e-5 at a time.

    It stops at the first move that makes the estimated L2 error larger. The search is torch.ao's, move for move, but
    the histogram is ours (torch.ao spreads counts out when its range grows, which depends on the order of the
    batches), and the full range is kept if it is no worse than the result: torch.ao never looks at it. The order of
    the batches does not matter.
    source   torch.ao.quantization.HistogramObserver, after norm_minimization.cc of Caffe2
    """

    def choose(self, bins: Bins, symmetric: bool, qmin: int, qmax: int) -> tuple[float, float]:
        occupied = bins.counts.nonzero()
        outer = int(occupied[0])
        start, end = cut(bins.counts[outer : int(occupied[-1]) + 1], qmax - qmin + 1)
        low, high = (bins.width * (bins.first + outer + i) for i in (start, end + 1))
        return max(bins.low, low), min(bins.high, high)


def cut(counts: torch.Tensor, codes: int) -> tuple[int, int]:
    """First and last bin to keep.

    counts   float64 [b], of which the first and the last are not empty
    codes    how many levels the kept bins are divided into
    """
    everything = (0, len(counts) - 1)
    kept, smallest = everything, math.inf
    for start, end in _narrowing(counts.cumsum(0).tolist()):
        error = cut_error(counts, start, end, codes)
        if error > smallest:
            break
        kept, smallest = (start, end), error
    return everything if cut_error(counts, *everything, codes) <= smallest else kept


def _narrowing(cumulative: list[float]) -> Iterator[tuple[int, int]]:
    """Ranges (first bin, last bin) that get ever smaller: each cuts off one more quantile at one end.

    It is cut off at the end whose next quantile lies more bins inward.
    """
    lower, upper = _quantiles()
    a, b = 0, 0  # how many quantiles each end has cut off
    start, end, total = 0, len(cumulative) - 1, cumulative[-1]
    while lower[a] < upper[b] and start < end:
        left = min(max(bisect_left(cumulative, lower[a + 1] * total), start), end)
        right = max(min(bisect_right(cumulative, upper[b + 1] * total) - 1, end), start)
        if left == start and right == end:
            # No quantile of the upper end moves it until one falls into the last bin: go there at once.
            b = max(bisect_left(upper, -cumulative[end], key=lambda quantile: -quantile * total) - 1, b + 1)
        elif left - start > end - right:
            start, a = left, a + 1
            yield start, end
        else:
            end, b = right, b + 1
            yield start, end


@cache
def _quantiles() -> tuple[list[float], list[float]]:
    """0 and up, 1 and down by 1e-5, summed one by one as torch.ao does: whole counts lie on such quantiles."""
    steps = range(round(1 / _QUANTILE_STEP) + 1)
    return (
        list(accumulate(steps, lambda alpha, _: alpha + _QUANTILE_STEP, initial=0.0)),
        list(accumulate(steps, lambda beta, _: beta - _QUANTILE_STEP, initial=1.0)),
    )


def cut_error(counts: torch.Tensor, start: int, end: int, codes: int) -> float:
    """Sum of squared errors, in bins^2, if bins start .. end become `codes` equal levels read at their centres.

    The values of a bin are spread evenly over it. What lies outside takes the centre of the outer level.
    """
    level = (end - start + 1) / codes
    left = torch.arange(len(counts), dtype=torch.float64, device="cpu") - start
    level_of_left, level_of_right = ((edge / level).floor().clamp(0, codes - 1) for edge in (left, left + 1))
    from_left = left - (level_of_left + 0.5) * level
    to_right = left + 1 - (level_of_right + 0.5) * level
    half = level / 2
    # To the end of the first level, whole levels, from the start of the last: -1 whole level if they are the same.
    cubes = (
        half**3 - from_left**3 + (level_of_right - level_of_left - 1) * 2 * half**3 + to_right**3 + half**3
    )
    return float((counts * cubes).sum() / 3)
