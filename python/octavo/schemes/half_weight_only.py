# SPDX-License-Identifier: Apache-2.0
"""Weights of 16 bits and float activations: half the memory of float32, and nothing is rounded that was bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..activations import Activations, Floats
from ..formats import Half, WeightFormat
from ..nn import PreparedLinear
from .base import Scheme


@dataclass(frozen=True)
class HalfWeightOnly(Scheme):
    """Weights bfloat16 or float16, products and sums in float32: fast where the CPU's own bfloat16 is slow or missing.

    dtype   None: bfloat16 and float16 weights stay as they are, and a float32 weight is rounded to bfloat16. "bfloat16"
            or "float16": every weight is rounded to it; float16 refuses a weight with values above 65504
    method  as in octavo.schemes.Scheme
    source  ours; docs/numerics.md
    """

    dtype: str | None = None
    weights: WeightFormat = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Half("bfloat16" if self.dtype is None else self.dtype))
        super().__post_init__()

    def read_input(self) -> Activations:
        return Floats()

    def prepare_linear(
        self, linear: nn.Module, *, estimator: str = "clipped", learn_scales: bool = False
    ) -> PreparedLinear:
        """As Scheme.prepare_linear. Raises ValueError for learned scales: there are none."""
        if learn_scales:
            raise ValueError(f"learn_scales: weights of {self.name} have no scales; use learn_scales=False")
        if self.dtype is None and linear.weight.dtype == torch.float16:
            return replace(self, dtype="float16").prepare_linear(linear, estimator=estimator)
        return super().prepare_linear(linear, estimator=estimator)
