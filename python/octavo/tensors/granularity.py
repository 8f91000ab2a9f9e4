# SPDX-License-Identifier: Apache-2.0
"""Granularities: which elements of a tensor share one scale.

Each one brings a tensor into rows [rows, columns], where the elements of a row share a scale, and back again. The
operators know rows only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


class Granularity(ABC):
    """Which elements of a tensor share one scale."""

    name: ClassVar[str]

    @abstractmethod
    def qparams_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of scale and zero_point for a tensor of `shape`. Raises ValueError if it does not fit."""

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as [rows, columns], one row for each scale."""
        rows = math.prod(self.qparams_shape(x.shape))
        return x.reshape(rows, x.numel() // rows if rows else 0)

    def from_rows(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The tensor of `shape` that `to_rows` cut into `rows`."""
        return rows.reshape(shape)


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor; shape []."""

    name: ClassVar[str] = "per_tensor"

    def qparams_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of `axis`, which is the axis kept: 0 for the outputs of a Linear; shape [C]."""

    axis: int = 0
    name: ClassVar[str] = "per_channel"

    def __post_init__(self):
        if not _is_int(self.axis):
            raise TypeError(f"PerChannel: axis must be an int, got {self.axis!r}")

    def qparams_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"{self}: x has shape {tuple(shape)} and no axis {self.axis}; "
                "choose an axis it has, or PerTensor()"
            )
        return (shape[self.axis],)

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        self.qparams_shape(x.shape)
        channels = x.shape[self.axis]
        return x.movedim(self.axis, 0).reshape(channels, x.numel() // channels if channels else 0)

    def from_rows(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        others = list(shape)
        channels = others.pop(self.axis)
        return rows.reshape(channels, *others).movedim(0, self.axis).contiguous()


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `group_size` neighbours along the last axis; shape [..., ceil(K / group_size)].

    A tail shorter than a group is padded with zeros while computing; codes keep the true size.
    """

    group_size: int = 128
    name: ClassVar[str] = "per_group"

    def __post_init__(self):
        if not _is_int(self.group_size):
            raise TypeError(f"PerGroup: group_size must be an int, got {self.group_size!r}")
        if self.group_size < 1:
            raise ValueError(f"PerGroup: group_size must be at least 1, got {self.group_size}")

    def qparams_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _require_last_axis(self, shape)
        return (*shape[:-1], -(-shape[-1] // self.group_size))

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        groups = math.prod(self.qparams_shape(x.shape))
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.group_size))
        return padded.reshape(groups, self.group_size)

    def from_rows(self, rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        padded = self.qparams_shape(shape)[-1] * self.group_size
        return rows.reshape(*shape[:-1], padded)[..., : shape[-1]].contiguous()


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each row of the last axis; shape [...], all axes but the last."""

    name: ClassVar[str] = "per_token"

    def qparams_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _require_last_axis(self, shape)
        return tuple(shape[:-1])


def require_granularity(granularity: Granularity | type[Granularity]) -> Granularity:
    """`granularity`, made if it is a class. Raises TypeError for anything else."""
    if isinstance(granularity, type) and issubclass(granularity, Granularity):
        granularity = granularity()
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"granularity is {granularity!r}, accepted are PerTensor(), PerChannel(axis), "
            "PerGroup(group_size) and PerToken()"
        )
    return granularity


def _require_last_axis(granularity: Granularity, shape: Sequence[int]) -> None:
    if len(shape) == 0:
        raise ValueError(f"{granularity}: x has no axis; a tensor with one value needs PerTensor()")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
