# SPDX-License-Identifier: Apache-2.0
"""What the product reads of a layer's input: the operator that computes it, and the same as floats for training.

One file of this folder is one way to read the input. What calibration finds for it, such as a fixed scale, lives in the
layer: `prepared` is the class of the layer on the way, `layer` the class of the frozen one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..base.configs import Config
from ..nn import PreparedLinear, QuantLinear
from ..observers import Observer
from ..tensors.qparams import QParams


@dataclass(frozen=True)
class Activations(Config, ABC):
    """How x [..., k] is read."""

    layer: ClassVar[type[QuantLinear]] = QuantLinear
    prepared: ClassVar[type[PreparedLinear]] = PreparedLinear
    needs_data: ClassVar[bool] = False  # whether batches must be seen before freezing

    @abstractmethod
    def int8_product(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        """The product of x and a packed weight of the format Int8: [..., n] in x's dtype.

        activation   None or the name of what is done to the result before it is rounded
        inputs       what the layer's `input_tensors` gives: the tensors that belong to these activations
        """

    @abstractmethod
    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """What the product will read of x [..., k], as floats in x's dtype; `layer` is prepared or frozen."""

    def fake_quantize_bias(self, bias: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        """What the integer layer that `layer` becomes will add for `bias` [n], in the dtype of the bias."""
        return bias

    # --- calibration ------------------------------------------------------------------------------------------------

    @property
    def has_zero_point(self) -> bool:
        """Whether the codes of the input have a zero point that calibration finds."""
        return False

    def observer(self) -> Observer | None:
        """A new observer of the input, if its scale is found by calibration."""
        return None

    def qparams(self, observer: Observer) -> QParams:
        """The scale and zero point of the input, from what `observer` has seen."""
        raise NotImplementedError(f"{self.name} observes no inputs")

    def finish_(self, layer: Any, prepared: Any) -> None:
        """Gives the frozen `layer` what calibration has found in `prepared`."""

    # --- files ------------------------------------------------------------------------------------------------------

    def compressed_tensors(self) -> dict[str, Any] | None:
        """The activations as compressed-tensors' QuantizationArgs say it; None: they stay float."""
        return None
