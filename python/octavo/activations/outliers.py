# SPDX-License-Identifier: Apache-2.0
"""Eight bits with a scale for each row, but for the few columns that hold outliers: those are read in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import ops
from ..nn import OutlierLinear, PreparedLinear, PreparedOutliers, QuantLinear
from ..tensors.fake_quantize import fake_quantize_per_token
from .base import Activations, Int8Operands


@dataclass(frozen=True)
class OutlierColumns(Activations):
    """threshold, relative   as in octavo.LLMInt8"""

    threshold: float = 6.0
    relative: bool = False

    layer: ClassVar[type[QuantLinear]] = OutlierLinear
    prepared: ClassVar[type[PreparedLinear]] = PreparedOutliers
    needs_data: ClassVar[bool] = True

    def find_outliers(self, absmax: torch.Tensor) -> torch.Tensor:
        """bool [k]: which columns hold outliers, if `absmax` float32 [k] are the largest |x| in each."""
        in_use = absmax > 0
        threshold = self.threshold
        if self.relative and in_use.any():
            threshold *= absmax[in_use].median().item()
        return in_use & (absmax >= threshold)

    def int8_product(
        self,
        x: torch.Tensor,
        operands: Int8Operands,
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        """The part in 8 bits."""
        return ops.linear_dynamic(x, *operands, bias, True, activation)

    @property
    def signed_codes(self) -> tuple[int, int]:
        return 8, 0

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return fake_quantize_per_token(x)

    def finish_(self, layer: Any, prepared: Any) -> None:
        columns = prepared.outlier_columns
        layer.set_outliers_(columns, prepared.weight_matrix.detach().index_select(1, columns))
