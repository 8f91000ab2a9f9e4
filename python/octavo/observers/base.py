# SPDX-License-Identifier: Apache-2.0
"""What every observer is: a module that sees batches and then says which range the codes should cover.

The range is turned into scale and zero point by `ops.choose_qparams`, the arithmetic of the whole package. State lives
in buffers, so that a model saved in the middle of its calibration goes on where it was.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import ops
from ..base.configs import Config
from ..base.float_types import FLOAT_DTYPES
from ..tensors.granularity import Granularity, PerChannel, PerTensor
from ..tensors.qparams import QParams

logger = logging.getLogger("octavo")

Range = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ObserverConfig(Config, ABC):
    """The choice of an observer and its options. A scheme can hold it, and a file can name it."""

    @abstractmethod
    def make(self, axis: int | None = None) -> Observer:
        """A fresh observer: one range for the tensor, or one for each index of `axis`, which is the axis kept."""


class Observer(nn.Module, ABC):
    """Is shown batches by `update`, and gives the `qparams` for all of them.

    Buffers: low and high float32 [c], the range so far (c is 1 per tensor, 0 before the first batch per channel), and
    batches int64, how many were counted. Empty batches are ignored. A batch with NaN or Inf is ignored as a whole,
    the first one with a warning through logging.
    """

    low: torch.Tensor
    high: torch.Tensor
    batches: torch.Tensor

    def __init__(self, config: ObserverConfig, axis: int | None = None):
        super().__init__()
        self.config = config
        self.axis = axis
        self.granularity: Granularity = PerTensor() if axis is None else PerChannel(axis)
        self._has_warned = False
        self.reset()

    def reset(self, *, channels: int = 0) -> None:
        """Forgets every batch. `channels`: how many there will be, if that is known; with an axis only."""
        self._allocate(1 if self.axis is None else channels)

    def _allocate(self, rows: int) -> None:
        """Makes the buffers for `rows` ranges, of which nothing was seen yet."""
        self.register_buffer("low", torch.zeros(rows, device="cpu"))
        self.register_buffer("high", torch.zeros(rows, device="cpu"))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device="cpu"))

    @property
    def is_initialized(self) -> bool:
        """Whether a batch was counted. `qparams` raises until then."""
        return bool(self.batches > 0)

    def update(self, x: torch.Tensor) -> None:
        """Counts one batch.

        x        float32, bfloat16 or float16; any shape and strides; read, not kept, in any autograd mode
        raises   TypeError for what is no such tensor; ValueError if axis is given and its size is another than before
        """
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(
                f"Observer.update: x is {kind}, accepted are tensors of float32, bfloat16 and float16"
            )
        # Buffers made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            rows = self.granularity.to_rows(x.detach())
            if rows.numel() == 0:
                return
            low, high = _row_ranges(rows)
            if not (low.isfinite() & high.isfinite()).all():
                self._warn_once()
                return
            if not self.is_initialized:
                self._allocate(len(rows))
            elif len(rows) != len(self.low):
                raise ValueError(
                    f"Observer.update: x has {len(rows)} channels on axis {self.axis}, the batches before had "
                    f"{len(self.low)}; reset() forgets them"
                )
            self._count(rows, low, high)
            self.batches += 1

    @abstractmethod
    def _count(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Adds the finite batch `rows` [c, columns], whose rows lie in [low, high], to the state."""

    @abstractmethod
    def _choose_range(self, symmetric: bool, qmin: int, qmax: int) -> Range:
        """The range of each row that codes qmin .. qmax should cover; what lies outside will be clipped."""

    def choose_range(self, symmetric: bool, qmin: int, qmax: int) -> Range:
        """(low, high), float32 [c] each: the range that codes qmin .. qmax should cover, in real units.

        symmetric   for symmetric qparams: they cover [-t, t] with t the larger of |low| and |high|
        raises      ValueError before the first batch
        """
        if not self.is_initialized:
            raise ValueError(
                f"{self.config.name} observer: no finite value was seen yet; run the model on calibration data first"
            )
        with torch.inference_mode(False), torch.no_grad():
            return self._choose_range(symmetric, qmin, qmax)

    def qparams(self, symmetric: bool, qmin: int, qmax: int) -> QParams:
        """Scale and zero point for codes qmin .. qmax: shape [] per tensor, [c] per channel.

        symmetric   True: zero_point is the middle of qmin .. qmax, which must be an integer (-127 .. 127)
        raises      ValueError before the first batch, and for a bad range of codes
        source      docs/numerics.md, eq. 2 and 3, for the range of `choose_range`
        """
        low, high = self.choose_range(symmetric, qmin, qmax)
        shape = () if self.axis is None else (len(low),)
        with torch.inference_mode(False), torch.no_grad():
            scale, zero_point = ops.choose_qparams(torch.stack([low, high], 1), qmin, qmax, symmetric)
            return QParams(scale.reshape(shape), zero_point.reshape(shape), qmin, qmax, self.granularity)

    def extra_repr(self) -> str:
        seen = "unknown" if self.batches.is_meta else int(self.batches)
        return f"{self.config}, axis={self.axis}, batches={seen}"

    def _warn_once(self) -> None:
        if not self._has_warned:
            logger.warning(
                "%s observer: a batch with NaN or Inf is ignored; further ones are without a warning",
                self.config.name,
            )
        self._has_warned = True

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Observer:
        """Moves the buffers with the model, but keeps them float32: `model.bfloat16()` must not round the range."""

        def keep_bits(t: torch.Tensor) -> torch.Tensor:
            return fn(t.view(torch.int32)).view(torch.float32) if t.is_floating_point() else fn(t)

        return super()._apply(keep_bits, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the number of channels from the file: a fresh observer does not know it."""
        low = state_dict.get(prefix + "low")
        if self.axis is not None and isinstance(low, torch.Tensor) and low.dim() == 1:
            self._allocate(len(low))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _row_ranges(rows: torch.Tensor) -> Range:
    # aminmax over everything is vectorized, over the last axis it is not: 0.1 against 2 ns for each element.
    low, high = rows[0].aminmax() if len(rows) == 1 else rows.aminmax(dim=1)
    return low.reshape(-1).float() + 0.0, high.reshape(-1).float() + 0.0  # -0.0 becomes 0.0, in any order
