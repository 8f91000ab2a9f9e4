# SPDX-License-Identifier: Apache-2.0
"""Sixteen bits with a scale for each row, found anew in every call: finer than bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from .base import Activations, Int8Operands


@dataclass(frozen=True)
class SixteenBits(Activations):
    """Kernels of bytes multiply them as two planes of 8 bits; docs/numerics.md, eq. 9 and 10."""

    def int8_product(
        self,
        x: torch.Tensor,
        operands: Int8Operands,
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        return ops.linear_weight_only(x, *operands, bias, activation)

    @property
    def signed_codes(self) -> tuple[int, int]:
        return 16, 0

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x  # 16 bits are nearly exact

    def compressed_tensors(self) -> dict[str, Any]:
        return {}
