# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, nearly exact activations: as small as Int8Dynamic, closer to the float model, slower at large batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from ..nn import PreparedLinear
from .base import Scheme


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """Weights int8 per output channel; each row of the input is rounded to 16 bits, finer than bfloat16.

    source   weight rounding: Jacob et al. 2018 (arXiv:1712.05877); the two 8-bit planes of the input: ours
    """

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        return ops.linear_weight_only(x, packed, column_sum, weight_scale, bias, activation)

    def fake_quantize_input(self, x: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        return x  # 16 bits are nearly exact
