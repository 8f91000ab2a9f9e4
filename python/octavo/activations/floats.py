# SPDX-License-Identifier: Apache-2.0
"""Floats as they are: x of any float dtype becomes float32, which is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from .base import Activations


@dataclass(frozen=True)
class Floats(Activations):
    """For weights that are floats themselves. Weights that are codes are dequantized and multiplied as floats."""

    def half_product(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
        activation: str | None = None,
    ) -> torch.Tensor:
        return ops.linear_half(x, packed, bias, n, activation)

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x

    def compressed_tensors(self) -> dict[str, Any]:
        return {}
