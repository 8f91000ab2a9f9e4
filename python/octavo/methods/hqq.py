# SPDX-License-Identifier: Apache-2.0
"""HQQ: zero points with which most weights are close, while a few large errors hardly count; needs no data.

A norm below 1 takes the errors for what they are, heavy-tailed: half-quadratic splitting alternates between codes,
errors without their noise, and zero points that fit what is left. docs/numerics.md, eq. 92.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..base.configs import require_int
from ..formats import WeightFormat
from ..tensors.qparams import QParams
from .base import Method

NORM, BETA, GROWTH = 0.7, 10.0, 1.01  # p, the weight of the quadratic term, and its growth from step to step
PIECE = 2**17  # weights at a time: what is computed of them stays in the L2 cache


@dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization: the zero point of each group is improved, its scale covers the range.

    steps    of the alternation, at most; each costs as much as rounding three times
    For integer formats with zero points, which are rounded to integers here; the one of each group that gave the least
    mean error is kept, the covering one among them, where the original takes the last.
    source   Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models; hqq 0.2.8,
             `optimize_weights_proximal_legacy`; docs/numerics.md, eq. 92
    """

    steps: int = 20

    def __post_init__(self) -> None:
        require_int("HQQ: steps", self.steps)
        if self.steps < 1:
            raise ValueError(f"HQQ: steps must be at least 1, got {self.steps}")

    def reason_to_refuse(self, scheme: Any) -> str:
        if scheme.weights.has_zero_points:
            return ""
        return f"HQQ improves zero points, and {scheme.name} has none; use symmetric=False"

    @torch.no_grad()
    def qparams(self, weights: WeightFormat, weight: torch.Tensor) -> QParams:
        covering = weights.qparams(weight)
        rows = covering.granularity.to_rows(weight.detach()).float()
        zero_point = covering.zero_point.reshape(-1).clone()
        step = max(PIECE // max(rows.shape[1], 1), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            q = covering.part(part)
            found = improved_zero_points(
                rows[part].T.contiguous(),
                1 / q.scale,
                q.zero_point.float(),
                (q.qmin, q.qmax),
                self.steps,
                whole=True,
            )
            zero_point[part] = found.int()
        return replace(covering, zero_point=zero_point.reshape(covering.zero_point.shape))


def improved_zero_points(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    zero_point: torch.Tensor,
    codes: tuple[int, int],
    steps: int,
    *,
    whole: bool,
) -> torch.Tensor:
    """Zero points float32 [rows] for weights `columns` [columns, rows], starting from `zero_point` [rows].

    inverse   1 / scale, [rows]; codes: the least and the largest one
    whole     zero points are judged, and returned, as integers that are codes
    """
    qmin, qmax = codes
    inexact, beta = zero_point, BETA
    best, least = zero_point, torch.full_like(zero_point, torch.inf)
    for _ in range(steps + 1):
        kept = inexact.round().clamp(qmin, qmax) if whole else inexact
        error = columns - _decoded(columns, inverse, kept, qmin, qmax)
        mean = error.abs().mean(0)
        best, least = torch.where(mean < least, kept, best), torch.minimum(mean, least)
        q = (columns * inverse + inexact).round_().clamp_(qmin, qmax)
        error = columns - (q - inexact) / inverse
        size = error.abs()
        shrunk = error.sign() * (size - size.pow(NORM - 1).div_(beta)).clamp_min_(
            0
        )  # 0^(p - 1) is Inf: 0 is left
        inexact = (q - (columns - shrunk) * inverse).mean(0)
        beta *= GROWTH
    return best


def _decoded(
    columns: torch.Tensor, inverse: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    return ((columns * inverse + zero_point).round_().clamp_(qmin, qmax) - zero_point) / inverse
