# SPDX-License-Identifier: Apache-2.0
"""Eight bits with a scale for each row, or for each row and group of columns, found anew in every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..base.configs import require_group_size
from ..tensors.fake_quantize import fake_quantize_per_token
from .base import Activations, Int8Operands


@dataclass(frozen=True)
class Dynamic(Activations):
    """symmetric    True: codes 1 .. 255 around 128. False: 0 .. 255 with a zero point for each row
    group_size   a multiple of 32: so many columns of a row share a scale, the last group may be short; None: all do
    raises       TypeError, ValueError for another group_size, and for groups with zero points
    """

    symmetric: bool = True
    group_size: int | None = None

    def __post_init__(self) -> None:
        require_group_size("Dynamic: group_size", self.group_size, 32)
        if self.group_size is not None and not self.symmetric:
            raise ValueError("Dynamic: groups of activations have symmetric codes; use symmetric=True")

    def int8_product(
        self,
        x: torch.Tensor,
        operands: Int8Operands,
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        if self.group_size is None:
            return ops.linear_dynamic(x, *operands, bias, self.symmetric, activation)
        packed, _, weight_scale = operands
        scale = weight_scale.reshape(-1)
        weight = ops.GroupWeight(packed, None, None, None, None, scale, len(scale), 8, 0, 128)
        return ops.linear_groups(x, weight, bias, 8, self.group_size, activation)

    @property
    def signed_codes(self) -> tuple[int, int] | None:
        return (8, self.group_size or 0) if self.symmetric else None

    @property
    def has_row_codes(self) -> bool:
        return self.symmetric and self.group_size is None

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return fake_quantize_per_token(x, self.symmetric, self.group_size)

    def compressed_tensors(self) -> dict[str, Any]:
        groups: dict[str, Any] = {"strategy": "token"}
        if self.group_size is not None:
            groups = {"strategy": "group", "group_size": self.group_size}
        return {"num_bits": 8, "type": "int", **groups, "symmetric": self.symmetric, "dynamic": True}
