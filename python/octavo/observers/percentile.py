# SPDX-License-Identifier: Apache-2.0
"""Percentile: clip the same fraction of values whatever they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .binned import BinnedConfig, Bins


@dataclass(frozen=True)
class Percentile(BinnedConfig):
    """The range that holds `percentile` % of the values, known to one bin; never narrower than one bin.

    Symmetric: at least percentile % of |x| lie inside. Affine: at most (100 - percentile) / 2 % lie outside at each
    end. 100 is MinMax. Activations of language models bear little: below 99.9 their few large values, which matter,
    are cut off. The order of the batches does not matter.
    percentile   in (0, 100]
    source       Wu et al. 2020 (arXiv:2004.09602), section 3.3; both tails as in ONNX Runtime's PercentileCalibrater
    """

    percentile: float = 99.99

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.percentile, (int, float)) or not 0 < self.percentile <= 100:
            raise ValueError(f"Percentile: percentile must be a number in (0, 100], got {self.percentile!r}")

    def choose(self, bins: Bins, symmetric: bool, qmin: int, qmax: int) -> tuple[float, float]:
        inside = self.percentile / 100
        if symmetric:
            t = min(bins.largest, bins.width * _bins_holding(bins.magnitudes(), inside))
            return -t, t
        one_side = (1 + inside) / 2
        end = bins.first + len(bins.counts)
        high = bins.width * (bins.first + _bins_holding(bins.counts, one_side))
        low = bins.width * (end - _bins_holding(bins.counts.flip(0), one_side))
        return max(bins.low, low), min(bins.high, high)


def _bins_holding(counts: torch.Tensor, fraction: float) -> int:
    """How many of the first bins it takes to hold `fraction` of all counts; at least one."""
    cumulative = counts.cumsum(0)
    return int(torch.searchsorted(cumulative, fraction * cumulative[-1])) + 1
