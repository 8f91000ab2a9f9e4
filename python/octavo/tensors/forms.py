# SPDX-License-Identifier: Apache-2.0
"""What a tensor of a quantized layer may be: its shape, its dtypes and, in words if they are wrong, its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class TensorForm(NamedTuple):
    """One tensor that a layer holds.

    dtype     in memory; None: as it comes
    accepted  the dtypes that a file may have for it
    fill      what an unfilled layer holds: one value, or all of them
    check     says what is wrong with a tensor's values, "" if nothing is; None: any value will do
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    accepted: tuple[torch.dtype, ...]
    fill: float | tuple[int, ...] = 0.0
    check: Callable[[torch.Tensor], str] | None = None

    def unfilled(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The tensor of an unfilled layer."""
        return torch.tensor(self.fill, dtype=self.dtype, device=device).expand(self.shape).clone()


def positive(scale: torch.Tensor) -> str:
    is_scale = (scale.isfinite() & (scale > 0)).all()
    return "" if is_scale else "values that are no scales: NaN, Inf, 0 or negative ones"


def not_negative(scale: torch.Tensor) -> str:
    is_scale = (scale.isfinite() & (scale >= 0)).all()
    return "" if is_scale else "values that are no scales: NaN, Inf or negative ones"


def finite(values: torch.Tensor) -> str:
    return "" if values.isfinite().all() else "NaN or Inf"


def not_nan(values: torch.Tensor) -> str:
    return "NaN" if values.isnan().any() else ""


def equal_to(expected: tuple[int, ...]) -> Callable[[torch.Tensor], str]:
    """A check of integers that are known beforehand."""

    def check(values: torch.Tensor) -> str:
        found = tuple(values.tolist())
        return "" if found == expected else f"{found} and not {expected}"

    return check


def ascending_below(k: int) -> Callable[[torch.Tensor], str]:
    """A check of indices, int64 [...]."""

    def check(columns: torch.Tensor) -> str:
        is_ordered = (columns.diff() > 0).all() and (columns >= 0).all() and (columns < k).all()
        return "" if is_ordered else f"values that are not ascending columns in 0 .. {k - 1}"

    return check
