# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, activations quantized to 8 bits row by row in every call: the fastest scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..fake_quantize import fake_quantize_per_token
from ..nn import PreparedLinear
from .base import Scheme


@dataclass(frozen=True)
class Int8Dynamic(Scheme):
    """Weights int8 per output channel; each row of the input gets a scale of its own at each call, no calibration.

    symmetric   True: activations are codes 1 .. 255 around 128. False: 0 .. 255 with a zero point for each row, which
                is finer for one-sided activations such as those after a ReLU
    source      per-token activations: Yao et al. 2022, ZeroQuant (arXiv:2206.01861), section 4.1; affine codes:
                Jacob et al. 2018 (arXiv:1712.05877), section 2.3
    """

    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"Int8Dynamic: symmetric must be True or False, got {self.symmetric!r}")

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        return ops.linear_dynamic(x, packed, column_sum, weight_scale, bias, self.symmetric, activation)

    def fake_quantize_input(self, x: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        return fake_quantize_per_token(x, self.symmetric)

    def compressed_tensors_activations(self) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "int",
            "strategy": "token",
            "symmetric": self.symmetric,
            "dynamic": True,
        }
