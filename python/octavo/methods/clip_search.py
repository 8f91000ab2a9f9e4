# SPDX-License-Identifier: Apache-2.0
"""Clip search: scales that do not cover the largest weights, where that brings the others closer than it costs.

With few bits a step is so coarse that a range which leaves the largest weight of a group out makes the sum of the
squared errors smaller. Several ranges are tried; for the codes that each of them gives, the best scale is known in
closed form. Without data large weights count more than small ones: they meet inputs that matter, and a plain sum of
squares, which clips them most, was worse than no search at all on models of 3 and 2 bits. With data the inputs say what
counts: X^T X, which is what an error of two weights does to the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..base.configs import require_flags, require_int
from ..formats import IntGroup, WeightFormat
from ..tensors.qparams import QParams
from .base import Method, RoundToNearest

LEAST, MOST = 0.4, 1.2  # shares of the covering range that are tried
ROUNDING = 2.0**-20  # of the square of a row: a gain that is smaller may be one of float32's sums
PIECE = 2**17  # weights at a time: what is computed of them stays in the L2 cache
COARSEST = 2  # bits, with which large weights count more than with 3 and 4
FEW_BITS = 4  # above, clipping gains little: 0.1 dB at 5 bits


@dataclass(frozen=True)
class ClipSearch(Method):
    """Each group gets the scale with which its weights are closest, among `steps` ranges and the covering one.

    steps      how many ranges are tried, from 0.4 to 1.2 of the one that covers all weights
    refit      the scale of a range is replaced by the one that fits the codes best, by least squares
    Errors count more where weights are large, eq. 87. No group is further off, counted so, than with RoundToNearest,
    except with scales that are quantized themselves. Zero points stay those of the covering range. It is the default
    of integer groups of 4 bits and fewer; it costs 0.1 seconds for each million weights, in training too, where each
    forward searches anew.
    source     the grid: Frantar et al. 2022 (arXiv:2210.17323), its code; the refit and the importance of large weights
               as ggml's K types have them; docs/numerics.md, eq. 87 and 88
    """

    steps: int = 20
    refit: bool = True

    def __post_init__(self) -> None:
        require_flags(self, "refit")
        require_int("ClipSearch: steps", self.steps)
        if self.steps < 2:
            raise ValueError(f"ClipSearch: steps must be at least 2, got {self.steps}")

    def reason_to_refuse(self, scheme: Any) -> str:
        return "" if has_scales(scheme.weights) else f"ClipSearch finds scales, and {scheme.name} has none"

    @torch.no_grad()
    def qparams(
        self, weights: WeightFormat, weight: torch.Tensor, gram: torch.Tensor | None = None
    ) -> QParams:
        """The scales for `weight` [n, k], the closest ones as `gram` [k, k] = X^T X of inputs X counts closeness."""
        covering = weights.qparams(weight)
        rows = covering.granularity.to_rows(weight.detach()).float()
        power = 1.0 if weights.bits <= COARSEST else 0.5
        pieces = list(_pieces(covering, rows, gram, power))
        scale = covering.scale.reshape(-1).clone()
        for piece in pieces:
            scale[piece.rows] = self._best_scale(piece)
        found = weights.stored_qparams(replace(covering, scale=scale.reshape(covering.scale.shape)))
        # As they can be stored, the scales are others: what counts is the error with those.
        scale = found.scale.reshape(-1).clone()
        for piece in pieces:
            gained = piece.gain(scale[piece.rows])[1] - piece.gain(piece.covering.scale)[1]
            is_better = gained > ROUNDING * piece.square()
            scale[piece.rows] = torch.where(is_better, scale[piece.rows], piece.covering.scale)
        return weights.stored_qparams(replace(covering, scale=scale.reshape(covering.scale.shape)))

    def _best_scale(self, piece: _Piece) -> torch.Tensor:
        covering = piece.covering.scale
        best, gain = covering, torch.full_like(covering, -torch.inf)
        for share in torch.linspace(LEAST, MOST, self.steps).tolist():
            scale, found = piece.gain(share * covering, refit=self.refit)
            best, gain = torch.where(found > gain, scale, best), torch.maximum(found, gain)
        return best


class _Piece(NamedTuple):
    """Some rows of weights that share a scale each, as columns [columns, rows]."""

    rows: slice
    columns: torch.Tensor
    covering: QParams
    metric: (
        torch.Tensor
    )  # what errors cost: X^T X [columns, columns], or the importance of each weight [columns, rows]
    is_gram: bool

    def seen(self, v: torch.Tensor) -> torch.Tensor:
        """`v` [columns, rows] times the metric."""
        return self.metric @ v if self.is_gram else self.metric * v

    def square(self) -> torch.Tensor:
        """The square of each row, as the metric counts."""
        return (self.columns * self.seen(self.columns)).sum(0)

    def gain(self, scale: torch.Tensor, *, refit: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, by how much the squared error of each row is less than its square): eq. 87, and 88 with `refit`."""
        v = self.covering.nearest_(self.columns * (1 / scale))
        seen = self.seen(v)
        wv, vv = (self.columns * seen).sum(0), (v * seen).sum(0)
        if refit:
            fitted = wv / vv
            scale = torch.where(fitted.isfinite() & (fitted > 0), fitted, scale)
        return scale, scale * (2 * wv - scale * vv)


def _pieces(
    covering: QParams, rows: torch.Tensor, gram: torch.Tensor | None, power: float
) -> Iterator[_Piece]:
    """All rows, a few at a time; with a gram, the rows at one place in k together."""
    count, width = rows.shape
    if gram is None:
        step = max(PIECE // max(width, 1), 1)
        for start in range(0, count, step):
            part = slice(start, start + step)
            columns = rows[part].T.contiguous()
            yield _Piece(part, columns, covering.part(part), weight_importance(columns, power), False)
        return
    groups = -(-len(gram) // width)
    for group in range(groups):
        part = slice(group, None, groups)
        at = slice(group * width, min((group + 1) * width, len(gram)))
        columns = rows[part, : at.stop - at.start].T.contiguous()
        yield _Piece(part, columns, covering.part(part), gram[at, at].to(columns), True)


def weight_importance(columns: torch.Tensor, power: float) -> torch.Tensor:
    """What a squared error of each weight in `columns` [columns, rows] counts, in units that do not matter: eq. 87."""
    squares = columns.square()
    largest = squares.amax(0).clamp_min(torch.finfo(torch.float32).tiny)  # so that no power underflows
    squares = squares / largest
    return (squares + squares.mean(0)) ** power


def has_scales(weights: WeightFormat) -> bool:
    """Whether codes of this format are multiplied by a scale, so that there is something to choose."""
    return weights.bits <= 8


def default_method(weights: WeightFormat) -> Method:
    """The method of schemes that name none: what is best without data and takes no long time.

    Codebooks keep the scales that other packages give them, and of 8 bits the rounding does not show.
    """
    is_coarse = isinstance(weights, IntGroup) and weights.bits <= FEW_BITS
    return ClipSearch() if is_coarse else RoundToNearest()
