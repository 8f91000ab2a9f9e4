# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGML in the form that all quantized tensors have: codes are the bytes of blocks, scales among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from .fake_quantize import straight_through
from .granularity import PerTensor
from .qparams import QParams, QuantizedTensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockQParams(QParams):
    """What makes blocks of the rows of a weight [n, k], and floats of blocks.

    type         as ggml spells it
    columns      k
    importance   [k] or None, as `ops.ggml_quantize` takes it
    """

    type: str = "Q4_K"
    columns: int = 0
    importance: torch.Tensor | None = None

    @classmethod
    def of(cls, type: str, columns: int, importance: torch.Tensor | None = None) -> BlockQParams:
        one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
        return cls(one, zero, 0, 255, PerTensor(), type, columns, importance)

    @property
    def nbytes(self) -> int:
        return 0  # scales are in the blocks

    @property
    def words(self) -> str:
        return f"blocks of {self.type}"

    def quantize(self, x: torch.Tensor) -> QuantizedBlocks:
        return QuantizedBlocks(ops.ggml_quantize(x.detach(), self.type, self.importance), self)

    def quantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return ops.ggml_quantize(rows.reshape(-1, self.columns), self.type, self.importance)

    def dequantize_rows(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        size = ops.block_type("dequantize", self.type).row_bytes(self.columns)
        return ops.ggml_dequantize(codes.reshape(-1, size), self.type, self.columns, dtype)

    def steps(self, codes: torch.Tensor) -> torch.Tensor:
        return self.dequantize_rows(codes, torch.float32)

    def fake_quantize_rows(self, rows: torch.Tensor, estimator: str) -> torch.Tensor:
        blocks = self.quantize_rows(rows.detach())
        return straight_through(rows, self.dequantize_rows(blocks, rows.dtype).reshape(rows.shape))


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedBlocks(QuantizedTensor):
    """`codes` are blocks, uint8 [n, bytes of a row]."""

    qparams: BlockQParams

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.codes), self.qparams.columns))
