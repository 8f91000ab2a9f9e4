# SPDX-License-Identifier: Apache-2.0
"""Entropy: clip where the distribution of |x| loses the least information when its bins become levels of codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .binned import BinnedConfig, Bins


@dataclass(frozen=True)
class Entropy(BinnedConfig):
    """The threshold whose clipped histogram of |x| has the smallest KL divergence from the histogram of its levels.

    Made for activations of convolutional nets; weak for fewer than 8 bits and for the outliers of language models.
    Affine ranges take the threshold at both ends, but never reach past the values. The order of the batches does not
    matter.
    source   Migacz 2017, "8-bit inference with TensorRT" (GTC 2017, S7310), with the details of NVIDIA's
             pytorch-quantization 2.1.2, calib/histogram.py: levels cut proportionally, of equal divergences the
             largest threshold, and the bin at zero, whose values come back exactly, counted as its neighbour
    """

    def choose(self, bins: Bins, symmetric: bool, qmin: int, qmax: int) -> tuple[float, float]:
        is_one_sided = bins.low >= 0 or bins.high <= 0
        codes = qmax - qmin + 1
        levels = codes if is_one_sided and not symmetric else (codes + 1) // 2
        t = min(bins.largest, bins.width * _threshold(bins.magnitudes(), levels))
        return (-t, t) if symmetric else (max(bins.low, -t), min(bins.high, t))


def _threshold(counts: torch.Tensor, levels: int) -> int:
    """How many bins to keep."""
    if len(counts) < levels:
        return len(counts)
    counts = torch.cat([counts[1:2], counts[1:]])
    candidates = torch.arange(levels, len(counts) + 1, device="cpu")
    return int(candidates.flip(0)[divergences(counts, candidates, levels).flip(0).argmin()])


def divergences(counts: torch.Tensor, candidates: torch.Tensor, levels: int) -> torch.Tensor:
    """KL(P || Q) for each number of bins to keep; inf where the last kept bin is empty and something is clipped.

    P is counts[:i] with all beyond added to its last bin. Q gives each of `levels` stretches of counts[:i] to its
    non-empty bins in equal parts.
    counts       float64 [b]; candidates int64 [t], each at least `levels`
    returns      float64 [t]
    source       docs/numerics.md, eq. 33
    """
    total, kept = counts.sum(), _sum_before(counts)[candidates]
    clipped = total - kept
    # Sums over a level are differences of running sums: every candidate costs O(levels), not O(bins).
    ends = torch.arange(levels + 1, device="cpu") * candidates[:, None]
    ends = -(-ends // levels)
    mass = _sum_before(counts)[ends].diff(dim=1)
    occupied = _sum_before((counts > 0).double())[ends].diff(dim=1)
    log_q = torch.where(mass > 0, mass / occupied, 1.0).log()
    cross = (mass * log_q).sum(1) + clipped * log_q[:, -1]
    last = counts[candidates - 1]
    entropy = _sum_before(torch.xlogy(counts, counts))[candidates - 1] + torch.xlogy(
        last + clipped, last + clipped
    )
    divergence = (entropy - cross) / total - total.log() + kept.log()
    return torch.where((last == 0) & (clipped > 0), math.inf, divergence)


def _sum_before(values: torch.Tensor) -> torch.Tensor:
    """Element i is the sum of values[:i]."""
    return F.pad(values.cumsum(0), (1, 0))
