# SPDX-License-Identifier: Apache-2.0
"""A histogram that grows without moving a single count: bins are powers of two wide and aligned to zero.

When a value falls outside, bins become twice as wide and neighbours are added in pairs, as often as needed. So all
counts are exact at every moment, whatever the order of the values and however they were cut into batches.
(Histograms over [min, max], as torch.ao and ONNX Runtime keep them, must share counts out at every growth.)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Observer, ObserverConfig, Range

CHUNK = 1 << 16  # elements binned at a time: their indices stay in the cache
_SMALLEST_EXPONENT = -126  # the smallest width is 2^-126, because its inverse is still a float32


@dataclass(frozen=True)
class Bins:
    """Counts of one row. Bin i holds the values of [(first + i) width, (first + i + 1) width).

    Below zero the lower end is the open one: -x is counted in the mirrored bin of x.
    counts      float64 [b], exact integers
    first       at most 0, and first + b at least 0: the bins always reach to zero, as a range of codes does
    low, high   the smallest and the largest value, exact
    """

    counts: torch.Tensor
    first: int
    width: float
    low: float
    high: float

    @property
    def largest(self) -> float:
        """max |x|"""
        return max(-self.low, self.high)

    def full_range(self, symmetric: bool) -> tuple[float, float]:
        """The range that codes must cover so that nothing is clipped."""
        return (-self.largest, self.largest) if symmetric else (min(self.low, 0.0), max(self.high, 0.0))

    def edges(self) -> torch.Tensor:
        """float64 [b + 1], ascending; exact."""
        steps = torch.arange(self.first, self.first + len(self.counts) + 1, dtype=torch.float64, device="cpu")
        return steps * self.width

    def magnitudes(self) -> torch.Tensor:
        """float64 counts of |x|: element i is for [i width, (i + 1) width)."""
        below, above = self.counts[: -self.first].flip(0), self.counts[-self.first :]
        size = max(len(below), len(above))
        return F.pad(below, (0, size - len(below))) + F.pad(above, (0, size - len(above)))


@dataclass(frozen=True, kw_only=True)
class BinnedConfig(ObserverConfig):
    """A method that reads the range off a histogram.

    bins   a power of two: there are at least that many between 0 and max |x|, and at most twice as many. So a bin is
           at most max |x| / bins wide, and every value is known to that. Memory: 32 bytes * bins for each range
    """

    bins: int = 2048

    def __post_init__(self):
        if not isinstance(self.bins, int) or self.bins < 128 or self.bins & (self.bins - 1):
            raise ValueError(
                f"{self.name}: bins must be a power of two and at least 128, got {self.bins!r}; 2048 is usual"
            )

    def make(self, axis: int | None = None) -> BinnedObserver:
        return BinnedObserver(self, axis)

    @abstractmethod
    def choose(self, bins: Bins, symmetric: bool, qmin: int, qmax: int) -> tuple[float, float]:
        """(low, high) that codes qmin .. qmax should cover, for one row whose largest value is not 0."""


class BinnedObserver(Observer):
    """Keeps the histogram of every row; the config chooses from it.

    Buffers, beside those that every observer has: counts int64 [c, 4 bins], of which the middle is 0, and exponent
    int32 [c]: the bins of row i are 2^exponent[i] wide.
    """

    config: BinnedConfig
    counts: torch.Tensor
    exponent: torch.Tensor

    def _allocate(self, rows: int) -> None:
        super()._allocate(rows)
        self.register_buffer(
            "counts", torch.zeros(rows, 4 * self.config.bins, dtype=torch.int64, device="cpu")
        )
        self.register_buffer(
            "exponent", torch.full((rows,), _SMALLEST_EXPONENT, dtype=torch.int32, device="cpu")
        )

    def _count(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        is_first = not self.is_initialized
        self.low = low if is_first else torch.minimum(self.low, low)
        self.high = high if is_first else torch.maximum(self.high, high)
        self._widen(torch.maximum(-low, high))
        columns = max(1, max(CHUNK, self.counts.numel()) // len(rows))
        inverse = torch.tensor([2.0**-e for e in self.exponent.tolist()], device="cpu")[:, None]
        middle = torch.arange(len(rows), dtype=torch.int32, device="cpu")[:, None] * self.counts.shape[1]
        middle += 2 * self.config.bins
        for part in rows.split(columns, dim=1):
            index = _bin_of(part.float(), inverse).add_(middle)
            self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, largest: torch.Tensor) -> None:
        """Doubles the width of each row's bins until |x| = `largest` [c] falls into one."""
        # largest < 2^power. frexp gives a row of zeros the power 0, which may be too wide for what comes later.
        power = torch.where(largest > 0, torch.frexp(largest).exponent, _SMALLEST_EXPONENT)
        bins_of_a_side = 2 * self.config.bins
        most = bins_of_a_side.bit_length() - 1  # log2: so many doublings make one bin of all bins of a side
        exponent = torch.maximum(self.exponent, power - most)
        doublings = exponent - self.exponent
        for done in range(most):  # after that all counts are in the two middle bins, and stay there
            rows = doublings > done
            if not rows.any():
                break
            self.counts[rows] = _halved(self.counts[rows])
        self.exponent = exponent

    def _choose_range(self, symmetric: bool, qmin: int, qmax: int) -> Range:
        ranges = []
        for row in range(len(self.low)):
            low, high = float(self.low[row]), float(self.high[row])
            if low < 0 or high > 0:
                low, high = self.config.choose(self.bins_of(row), symmetric, qmin, qmax)
            ranges.append((low, high))
        lows, highs = torch.tensor(ranges, dtype=torch.float32, device="cpu").reshape(-1, 2).unbind(1)
        return lows, highs

    def bins_of(self, row: int = 0) -> Bins:
        """The histogram of one row. It begins at the smallest value or at 0 and ends at the largest value or at 0."""
        middle = 2 * self.config.bins
        occupied = self.counts[row].nonzero()
        start, stop = min(int(occupied[0]), middle), max(int(occupied[-1]) + 1, middle)
        return Bins(
            self.counts[row, start:stop].double(),
            start - middle,
            math.ldexp(1.0, int(self.exponent[row])),
            float(self.low[row]),
            float(self.high[row]),
        )


def _bin_of(x: torch.Tensor, inverse_width: torch.Tensor) -> torch.Tensor:
    """floor(|x| / width), int32, for x >= 0; the mirrored -1 - floor(|x| / width) below zero."""
    magnitude = (x.abs() * inverse_width).to(torch.int32)  # exact: inverse_width is a power of two
    return magnitude.bitwise_xor_((x < 0).to(torch.int32).neg_())  # -1 - i is i with all bits flipped


def _halved(counts: torch.Tensor) -> torch.Tensor:
    """The counts of bins twice as wide, in the middle of as many bins."""
    half = counts.shape[1] // 4
    return F.pad(counts.unflatten(1, (-1, 2)).sum(2), (half, half))
