# SPDX-License-Identifier: Apache-2.0
"""What a layer's inputs were, as far as methods ask: X^T X, the mean |x| of each channel, and how many rows there were.

Hooks see what the layers read. Layers that read one tensor, such as q, k and v, have it multiplied once. Positions of
padding do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.hooks import hooked
from ..base.padding import Masks, Padding

CHUNK = 2048  # rows that are multiplied in float32 at a time; the products are added in float64


class InputStatistics:
    """Sums over all rows that a layer has read; `gram` float64 [k, k], `absolute` float64 [k]."""

    def __init__(self, k: int):
        self.rows = 0
        self.gram = torch.zeros(k, k, dtype=torch.float64, device="cpu")
        self.absolute = torch.zeros(k, dtype=torch.float64, device="cpu")

    def add(self, sums: _Sums) -> None:
        self.rows += sums.rows
        self.gram += sums.gram
        self.absolute += sums.absolute


class _Sums(NamedTuple):
    """Of one tensor."""

    rows: int
    gram: torch.Tensor
    absolute: torch.Tensor


@contextmanager
def recorded(model: nn.Module, layers: Sequence[Any], positions: Positions | None = None) -> Iterator[None]:
    """Inside, what `layers`, prepared ones, read while `model` runs is added to their `statistics`.

    positions   those that count, if whoever runs the batches says so; else the masks in the arguments of `model` do
    raises      ValueError for NaN and Inf in an input, which names the layer
    """
    told = positions is not None
    positions = Positions(model) if positions is None else positions
    last: dict[str, Any] = {}

    def see(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        x: torch.Tensor = args[0] if args else kwargs["input"]
        if last.get("x") is not x or last.get("version") != x._version:
            rows = positions.padding.rows(x.detach(), positions.masks, has_channels=True)
            last.update(x=x, version=x._version, sums=_sums(rows.reshape(-1, x.shape[-1])))
        if not last["sums"].absolute.isfinite().all():
            raise ValueError(
                f"layer {layer.name!r} reads NaN or Inf on this data, of which nothing can be learned; leave the batch "
                f"out, or keep the layer with exclude={layer.name!r}"
            )
        layer.statistics.add(last["sums"])

    for layer in layers:
        if layer.statistics is None:
            layer.statistics = InputStatistics(layer.in_features)
    asking = [] if told else [(model, lambda _, args, kwargs: positions.look_at(args, kwargs))]
    with hooked(asking, before=True), hooked([(layer, see) for layer in layers], before=True):
        yield


class Positions:
    """Which positions of the batch that runs count."""

    def __init__(self, model: nn.Module):
        self.padding = Padding(model)
        self.masks: Masks = []

    def look_at(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Takes the masks among these arguments of the model."""
        self.masks = self.padding.given_masks(args, kwargs)

    def find(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The same, and if there are none, those that modules inside are given, for which it may run the model."""
        self.masks = self.padding.masks(args, kwargs)


def _sums(rows: torch.Tensor) -> _Sums:
    k = rows.shape[-1]
    gram = torch.zeros(k, k, dtype=torch.float64, device="cpu")
    absolute = torch.zeros(k, dtype=torch.float64, device="cpu")
    for chunk in rows.split(CHUNK):
        x = chunk.float()
        gram += x.T @ x
        absolute += x.abs().sum(0)
    return _Sums(len(rows), gram, absolute)


def gram_of(prepared: Any) -> torch.Tensor:
    """X^T X float64 [k, k] of what multiplies `prepared.float_weight()`; its statistics are of the inputs before that.

    A layer whose weight was multiplied by s reads x / s.
    """
    gram: torch.Tensor = prepared.statistics.gram
    s = getattr(prepared, "smoothing", None)
    return gram if s is None else gram / (s.double() * s.double()[:, None])
