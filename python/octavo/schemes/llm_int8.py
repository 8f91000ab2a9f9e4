# SPDX-License-Identifier: Apache-2.0
"""LLM.int8(): the few input columns that hold outliers are multiplied in 16 bits, all others in 8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .. import ops
from ..fake_quantize import fake_quantize_per_token
from ..nn import OutlierLinear, PreparedLinear, PreparedOutliers, QuantLinear
from .base import Scheme


@dataclass(frozen=True)
class LLMInt8(Scheme):
    """As Int8Dynamic, without the columns of x in which calibration has seen an |x| of `threshold` or more.

    Those stay floats in the weight and are multiplied in 16 bits; the scale of a row is found without them.
    threshold   >= 0, in the units of x. 6.0 suits inputs that a norm has brought to unit variance; 0.0 makes every
                column that is not all zero an outlier
    relative    True: threshold counts in medians of the columns' largest |x|, for inputs of any size
    source      Dettmers et al. 2022 (arXiv:2208.07339), section 3.2, where the columns are found anew in every call;
                here they are fixed, so that a row does not depend on the rows beside it
    """

    threshold: float = 6.0
    relative: bool = False

    layer: ClassVar[type[QuantLinear]] = OutlierLinear
    needs_data: ClassVar[bool] = True

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """The paper's threshold, which no column of the study's small model reaches, and one that some do."""
        return [cls(), cls(4.0)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.relative, bool):
            raise TypeError(f"LLMInt8: relative must be True or False, got {self.relative!r}")
        if not isinstance(self.threshold, int | float) or isinstance(self.threshold, bool):
            raise TypeError(f"LLMInt8: threshold must be a number, got {self.threshold!r}")
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"LLMInt8: threshold must be finite and not negative, got {self.threshold}")
        object.__setattr__(self, "threshold", float(self.threshold))

    def find_outliers(self, absmax: torch.Tensor) -> torch.Tensor:
        """bool [k]: which columns hold outliers, if `absmax` float32 [k] are the largest |x| in each."""
        in_use = absmax > 0
        threshold = self.threshold
        if self.relative and in_use.any():
            threshold *= absmax[in_use].median().item()
        return in_use & (absmax >= threshold)

    def prepare_linear(
        self, linear: nn.Linear, *, estimator: str = "clipped", learn_scales: bool = False
    ) -> PreparedLinear:
        return PreparedOutliers(linear, self, estimator=estimator, learn_scales=learn_scales)

    def freeze(self, prepared: Any) -> QuantLinear:
        prepared.require_calibrated()
        layer: Any = super().freeze(prepared)
        columns = prepared.outlier_columns
        layer.set_outliers_(columns, prepared.weight.detach().index_select(1, columns))
        return layer

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """The part in 8 bits."""
        return ops.linear_dynamic(x, packed, column_sum, weight_scale, bias, activation=activation)

    def fake_quantize_input(self, x: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        return fake_quantize_per_token(x)
