# SPDX-License-Identifier: Apache-2.0
"""Eight bits with a scale for each row, found anew in every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..tensors.fake_quantize import fake_quantize_per_token
from .base import Activations, Int8Operands


@dataclass(frozen=True)
class Dynamic(Activations):
    """symmetric   True: codes 1 .. 255 around 128. False: 0 .. 255 with a zero point for each row"""

    symmetric: bool = True

    def int8_product(
        self,
        x: torch.Tensor,
        operands: Int8Operands,
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        return ops.linear_dynamic(x, *operands, bias, self.symmetric, activation)

    @property
    def has_row_codes(self) -> bool:
        return self.symmetric

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return fake_quantize_per_token(x, self.symmetric)

    def compressed_tensors(self) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "int",
            "strategy": "token",
            "symmetric": self.symmetric,
            "dynamic": True,
        }
