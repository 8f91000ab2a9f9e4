# SPDX-License-Identifier: Apache-2.0
"""MSE: of many ranges, take the one whose codes are closest to the values, counting all batches.

The error of a range is read off the histogram, with the values of a bin spread evenly over it: an integral in closed
form, so it costs the same for any number of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import ops
from .binned import BinnedConfig, Bins

LOW, HIGH, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)  # the ends of a range


@dataclass(frozen=True)
class MSE(BinnedConfig):
    """The range with the smallest mean squared error of dequantize(quantize(x)), over all batches.

    Tried are `steps` equal steps up to the full range, then as many finer ones around the best; affine ranges move both
    ends together, then each end alone. The root mean square error is known to one bin, so the chosen range is at most
    two bins worse than the best one tried (docs/numerics.md, eq. 32). The order of the batches does not matter.
    source   Choukroun et al. 2019 (arXiv:1902.06822), section 3; the grid as in torchao's AffineQuantizedMSEObserver,
             which however keeps the last batch only; the integral: ours
    """

    steps: int = 100

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.steps, int) or self.steps < 2:
            raise ValueError(f"MSE: steps must be an int of at least 2, got {self.steps!r}")

    def choose(self, bins: Bins, symmetric: bool, qmin: int, qmax: int) -> tuple[float, float]:
        full = torch.tensor(bins.full_range(symmetric), dtype=torch.float64, device="cpu")
        coarse = torch.arange(1, self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        fine = torch.linspace(-1, 1, self.steps, dtype=torch.float64, device="cpu") / self.steps

        def better(kept: torch.Tensor, end: slice, tried: torch.Tensor) -> torch.Tensor:
            """The best of `kept` [2], the shares of the low and the high end, and of `kept` with `tried` at `end`."""
            candidates = kept.repeat(len(tried) + 1, 1)
            candidates[1:, end] = tried.clamp(bins.width / bins.largest, 1)[:, None]  # at least one bin
            low, high = (candidates * full).unbind(1)
            return candidates[squared_errors(bins, low, high, symmetric, qmin, qmax).argmin()]

        kept = torch.ones(2, dtype=torch.float64, device="cpu")
        for end in (BOTH,) if symmetric else (BOTH, HIGH, LOW):
            kept = better(kept, end, coarse)
            kept = better(kept, end, kept[end][0] + fine)
        low, high = (kept * full).tolist()
        return low, high


def squared_errors(
    bins: Bins, low: torch.Tensor, high: torch.Tensor, symmetric: bool, qmin: int, qmax: int
) -> torch.Tensor:
    """Mean of (dequantize(quantize(x)) - x)^2 for each candidate range, if bins are evenly filled.

    low, high   float64 [t]
    returns     float64 [t]
    source      docs/numerics.md, eq. 31
    """
    scale, zero_point = ops.choose_qparams(torch.stack([low, high], 1).float(), qmin, qmax, symmetric)
    s, z = scale.double()[:, None], zero_point.double()[:, None]
    x, counts = _filled(bins)
    q = torch.round(x / s).clamp(qmin - z, qmax - z)
    integral = q * s**3 / 12 + (x - q * s) ** 3 / 3  # from 0 to x, of the squared error
    return integral.diff(dim=1) @ counts / (bins.width * counts.sum())


def _filled(bins: Bins) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges float64 [e] of the bins that hold values, and the counts [e - 1] between them.

    Neighbours that are empty count as one bin: a few values in thousands of bins then cost little.
    """
    is_filled = bins.counts > 0
    is_edge = F.pad(is_filled, (0, 1)) | F.pad(is_filled, (1, 0))
    x = bins.edges()[is_edge]
    return x, bins.counts[is_edge[:-1]][: len(x) - 1]
