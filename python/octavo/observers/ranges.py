# SPDX-License-Identifier: Apache-2.0
"""Observers that remember a range only: the extremes of everything, or a moving average of each batch's extremes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Observer, ObserverConfig, Range


@dataclass(frozen=True)
class MinMax(ObserverConfig):
    """The smallest and the largest value seen: nothing is clipped, and one outlier rules for ever.

    The order of the batches does not matter.
    source   Jacob et al. 2018 (arXiv:1712.05877), section 3; torch.ao's MinMaxObserver
    """

    def make(self, axis: int | None = None) -> MinMaxObserver:
        return MinMaxObserver(self, axis)


@dataclass(frozen=True)
class MovingAverage(ObserverConfig):
    """Exponential moving average of the batches' extremes: low <- low + (1 - momentum) (batch's low - low).

    The first batch sets the range. The order of the batches matters: the last ones weigh most.
    momentum   in [0, 1): what is kept of the range at each batch. 0.9 as in quanto; torch.ao's averaging_constant is
               1 - momentum and 0.01 there
    source     Jacob et al. 2018 (arXiv:1712.05877), section 3.1; torch.ao's MovingAverageMinMaxObserver
    """

    momentum: float = 0.9

    def __post_init__(self):
        if not isinstance(self.momentum, (int, float)) or not 0 <= self.momentum < 1:
            raise ValueError(f"MovingAverage: momentum must be a number in [0, 1), got {self.momentum!r}")

    def make(self, axis: int | None = None) -> MovingAverageObserver:
        return MovingAverageObserver(self, axis)


class _RangeObserver(Observer):
    """An observer that keeps a range and nothing else."""

    def _choose_range(self, symmetric: bool, qmin: int, qmax: int) -> Range:
        return self.low.clone(), self.high.clone()


class MinMaxObserver(_RangeObserver):
    """Made by `MinMax`."""

    def _count(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        is_first = not self.is_initialized
        self.low = low if is_first else torch.minimum(self.low, low)
        self.high = high if is_first else torch.maximum(self.high, high)


class MovingAverageObserver(_RangeObserver):
    """Made by `MovingAverage`."""

    config: MovingAverage

    def _count(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        is_first = not self.is_initialized
        weight = 1 - self.config.momentum
        self.low = low if is_first else self.low + weight * (low - self.low)
        self.high = high if is_first else self.high + weight * (high - self.high)
