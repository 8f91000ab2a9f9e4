# SPDX-License-Identifier: Apache-2.0
"""Eight bits with one scale for all of a layer's input, which calibration has found: no pass over the input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import observers, ops
from ..formats import WeightFormat
from ..nn import PreparedLinear, QuantLinear, StaticQuantLinear
from ..observers import Observer, ObserverConfig
from ..tensors.fake_quantize import fake_quantize, fake_quantize_bias, lsq
from ..tensors.qparams import QParams
from .base import Activations, Int8Operands


@dataclass(frozen=True)
class Static(Activations):
    """observer, symmetric, int32_bias   as in octavo.Int8Static"""

    observed_by: ObserverConfig = observers.MSE()
    symmetric: bool = True
    int32_bias: bool = False

    layer: ClassVar[type[QuantLinear]] = StaticQuantLinear
    needs_data: ClassVar[bool] = True

    def int8_product(
        self,
        x: torch.Tensor,
        operands: Int8Operands,
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        input_scale, input_zero_point = inputs
        return ops.linear_static(x, *operands, bias, input_scale, input_zero_point, activation)

    def reason_to_refuse(self, weights: WeightFormat) -> str:
        if self.int32_bias and not weights.has_row_scales:
            return (
                f"int32_bias=True needs one scale for each row of the weight, and rows of {weights.name} have several; "
                "use int32_bias=False"
            )
        return ""

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        q = layer.input_qparams
        if getattr(layer, "learn_scales", False):
            # The paper's factor for activations: features are counted, rows are not.
            factor = 1 / math.sqrt(layer.in_features * q.qmax)
            y = lsq(x, layer.input_scale, q.qmin, q.qmax, offset=layer.input_offset, grad_factor=factor)
        else:
            estimator = getattr(layer, "estimator", "clipped")
            y = fake_quantize(x, q.scale, q.zero_point, q.qmin, q.qmax, estimator=estimator)
        return y + (x - x).detach()  # NaN where x is not finite: the integer layer gives such rows as NaN

    def fake_quantize_bias(self, bias: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        if not self.int32_bias:
            return bias
        scales = layer.input_qparams.scale, layer.weight_qparams.scale
        try:
            return fake_quantize_bias(bias, *scales, layer.in_features)
        except ValueError as error:
            raise ValueError(f"layer {layer.name!r}: {error}") from error

    @property
    def has_zero_point(self) -> bool:
        return not self.symmetric

    def observer(self) -> Observer:
        return self.observed_by.make()

    def qparams(self, observer: Observer) -> QParams:
        # Symmetric codes reach -128 as well, but the scale is that of 127 steps, so that -t and t get mirrored codes.
        return observer.qparams(self.symmetric, -127 if self.symmetric else -128, 127)

    def finish_(self, layer: Any, prepared: Any) -> None:
        layer.set_input_qparams_(prepared.input_qparams)

    def compressed_tensors(self) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "int",
            "strategy": "tensor",
            "symmetric": self.symmetric,
            "dynamic": False,
        }
