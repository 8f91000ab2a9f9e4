# SPDX-License-Identifier: Apache-2.0
"""What the product reads of a layer's input: the operator that computes it, and the same as floats for training.

One file of this folder is one way to read the input: it says what its codes are worth as floats, and, if there is a
kernel for a weight format, which. What calibration finds for it, such as a fixed scale, lives in the
layer: `prepared` is the class of the layer on the way, `layer` the class of the frozen one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..base.configs import Config
from ..formats import WeightFormat
from ..nn import PreparedLinear, QuantLinear
from ..observers import Observer
from ..tensors.qparams import QParams

Int8Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as octavo.formats.Int8 names them


@dataclass(frozen=True)
class Activations(Config, ABC):
    """How x [..., k] is read."""

    layer: ClassVar[type[QuantLinear]] = QuantLinear
    prepared: ClassVar[type[PreparedLinear]] = PreparedLinear
    needs_data: ClassVar[bool] = False  # whether batches must be seen before freezing

    # What multiplies x and a weight of the format Int8, a method with the arguments of formats.Kernel; None: no kernel
    # does, and the product is one of floats, of what `fake_quantize` gives and of the dequantized weight.
    int8_product: ClassVar[Any] = None
    # The same for weights of the format Half, f(x, packed, bias, n, activation).
    half_product: ClassVar[Any] = None

    @property
    def signed_codes(self) -> tuple[int, int] | None:
        """(bits, group_size) if the product reads symmetric codes whose scales, one for each row and so many neighbours
        in it (0: for each row), are found anew in every call, as the kernels of group formats do; None: not so."""
        return None

    @property
    def has_row_codes(self) -> bool:
        """Whether the codes of the input are those that `ops.add_norm_codes` gives: 8 bits, symmetric, row by row."""
        return False

    def reason_to_refuse(self, weights: WeightFormat) -> str:
        """Why a layer that reads its input like this cannot have such weights, in words; "" if it can."""
        return ""

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
        """What compressed-tensors' QuantizationArgs say of them; {} if they are as good as floats, None if there
        are no words for them."""
        return None
