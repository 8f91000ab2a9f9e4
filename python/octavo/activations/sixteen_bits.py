# SPDX-License-Identifier: Apache-2.0
"""Sixteen bits with a scale for each row, found anew in every call: finer than bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from .base import Activations


@dataclass(frozen=True)
class SixteenBits(Activations):
    """Kernels of bytes multiply them as two planes of 8 bits; docs/numerics.md, eq. 9 and 10."""

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
        return ops.linear_weight_only(x, packed, column_sum, weight_scale, bias, activation)

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x  # 16 bits are nearly exact
