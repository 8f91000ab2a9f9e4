# SPDX-License-Identifier: Apache-2.0
"""What a method is: which codes are chosen for a weight, and what is learned from data first.

A method is at work from `prepare_` to `freeze_`. It may bring a class of prepared layers that watches the input, it is
told of each run over the data, and it finishes the frozen layer. A frozen layer does not know its method, unless
something is left to be done in every call, such as a rescaling that no other layer could absorb.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..base.configs import Config
from ..formats import WeightFormat
from ..nn import PreparedLinear, QuantLinear
from ..tensors.qparams import QParams, QuantizedTensor
from .statistics import Positions


@dataclass(frozen=True)
class Method(Config):
    """How the codes of a weight are chosen."""

    needs_data: ClassVar[bool] = False  # whether batches must be seen before freezing
    # Whether `quantize_` goes block by block, so that each layer sees what the quantized ones before it give.
    is_sequential: ClassVar[bool] = False
    rounds_to_nearest: ClassVar[bool] = True  # whether each weight's code is the nearest one to it

    def reason_to_refuse(self, scheme: Any) -> str:
        """Why this method cannot choose codes for `scheme`, in words; "" if it can."""
        return ""

    def passes(self, scheme: Any) -> int:
        """How often the data must be run, for this method and the activations of `scheme`."""
        return 1 if self.needs_data or scheme.activations.needs_data else 0

    def prepared(self, scheme: Any) -> type[PreparedLinear]:
        """The class of the prepared layers; instances are made with an `observer`."""
        return scheme.activations.prepared

    def layer(self, scheme: Any) -> type[QuantLinear]:
        """The class of frozen layers whose scheme still names this method, because something is left to be done."""
        return scheme.activations.layer

    @classmethod
    @contextmanager
    def watching(
        cls, model: nn.Module, layers: Sequence[Any], *, in_place: bool, positions: Positions | None = None
    ) -> Iterator[None]:
        """Inside, `model` runs on batches while `layers`, all prepared for methods of this class, watch.

        in_place    True: other layers that change keep their Parameters, which an optimizer may have; False: they get
                    new ones, because another model has the same Parameters
        positions   those of the present batch that count, if whoever runs the batches knows them
        """
        yield

    def require_ready(self, prepared: Any) -> None:
        """Raises ValueError if codes cannot be chosen yet."""

    def qparams(self, weights: WeightFormat, weight: torch.Tensor) -> QParams:
        """The scales for `weight` [n, k], in training and in the frozen layer. Raises ValueError for NaN or Inf."""
        return weights.qparams(weight)

    def choose_codes(self, prepared: Any) -> QuantizedTensor:
        """The codes of the weight, chosen with what was learned of the input. Here: the codes that training saw."""
        return prepared.quantized_weight

    def frozen_scheme(self, prepared: Any) -> Any:
        """The scheme that the frozen layer has."""
        return prepared.scheme

    def finish_(self, layer: Any, prepared: Any) -> None:
        """Tells the frozen `layer` what is left to be done in every call."""


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Each weight gets the code that is nearest to it, with scales that cover the largest weight.

    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1
    """
