# SPDX-License-Identifier: Apache-2.0
"""Tensors of 16-bit floats in the form that all quantized tensors have: codes that are the values, with the scale 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .fake_quantize import straight_through
from .granularity import PerTensor
from .qparams import QParams


@dataclass(frozen=True, eq=False, repr=False)
class Rounding(QParams):
    """Rounding to bfloat16 or float16, half to even; float16 makes Inf of what is too large for it."""

    half: torch.dtype = torch.bfloat16

    @classmethod
    def to(cls, half: torch.dtype) -> Rounding:
        return cls(torch.ones(()), torch.zeros((), dtype=torch.int32), 0, 0, PerTensor(), half)

    @property
    def dtype(self) -> torch.dtype:
        return self.half

    @property
    def nbytes(self) -> int:
        return 0  # nobody stores the scale 1

    @property
    def words(self) -> str:
        return f"values of {str(self.half).removeprefix('torch.')}"

    def quantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.half)

    def dequantize_rows(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.to(dtype, copy=True)

    def steps(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def fake_quantize_rows(self, rows: torch.Tensor, estimator: str) -> torch.Tensor:
        return straight_through(rows, rows.detach().to(self.half).to(rows.dtype))
