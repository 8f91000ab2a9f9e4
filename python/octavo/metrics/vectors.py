# SPDX-License-Identifier: Apache-2.0
"""How far each vector of an encoder has turned, and whether it still has the same neighbour.

One cosine is kept for each vector. Neighbours need the vectors themselves: the first NEIGHBOURS of them are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .error import check_pair

NEIGHBOURS = 4096  # 12 MB for vectors of 384 numbers, and a matrix product of a second


@dataclass(frozen=True)
class Vectors:
    """An encoder's vectors against the reference's.

    mean_cosine, worst_cosine   over all vectors
    same_neighbour              share of the vectors (of the first 4,096) whose nearest other one, by cosine, is the
                                same; NaN for fewer than two
    """

    vectors: int
    mean_cosine: float
    worst_cosine: float
    same_neighbour: float


class VectorsAccumulator:
    """Streaming figures of embeddings [vectors, dim] against their reference.

    Source: docs/numerics.md, eq. 13 for each row.
    """

    def __init__(self) -> None:
        self._cosines: list[torch.Tensor] = []
        self._kept: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def update(self, reference: torch.Tensor, approximation: torch.Tensor) -> None:
        """Adds the vectors of two tensors [..., dim] of the same shape.

        Raises: TypeError if one is not a real tensor; ValueError if the shapes differ or there is no axis.
        """
        check_pair(reference, approximation, "approximation")
        if reference.dim() == 0:
            raise ValueError("metrics: vectors need at least one axis, got a scalar")
        x, y = (tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in (reference, approximation))
        room = NEIGHBOURS - sum(len(rows) for rows in self._kept[0])
        for kept, rows in zip(self._kept, (x, y), strict=True):
            kept.append(rows[: max(room, 0)].clone())
        self._cosines.append(_row_cosines(x.double(), y.double()))

    def result(self) -> Vectors:
        """The figures so far. Raises: ValueError if there is no vector yet."""
        cosines = torch.cat(self._cosines) if self._cosines else torch.empty(0)
        if len(cosines) == 0:
            raise ValueError("metrics: there is no vector yet; update first")
        before, after = (_neighbours(torch.cat(kept)) for kept in self._kept)
        same = (before == after).double().mean().item() if len(before) > 1 else math.nan
        return Vectors(len(cosines), cosines.mean().item(), cosines.min().item(), same)


def _row_cosines(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x_length, y_length = x.norm(dim=-1), y.norm(dim=-1)
    cosines = ((x * y).sum(-1) / (x_length * y_length)).clamp(-1.0, 1.0)
    cosines = torch.where((x_length == 0) | (y_length == 0), 0.0, cosines)
    return torch.where((x == y).all(-1), 1.0, cosines)  # exactly, where rounding of the sums would miss it


def _neighbours(vectors: torch.Tensor) -> torch.Tensor:
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (units @ units.T).fill_diagonal_(-2.0).argmax(-1)
