# SPDX-License-Identifier: Apache-2.0
"""Formats of weights in groups: what integers in groups, codebooks and the blocks of ggml have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from .. import ops
from ..tensors.codebook import Codebook, CodebookQParams, codebook_qparams
from ..tensors.forms import TensorForm
from ..tensors.granularity import PerGroup
from ..tensors.qparams import QParams, QuantizedTensor
from ..tensors.strips import from_strips, rows_of_strips, to_strips
from .base import Kernel, Tensors, WeightFormat, on_huge_pages


class GroupFormat(WeightFormat, ABC):
    """A format of weights in groups that `ops.linear_groups` multiplies. Its operands are buffers, and out_features."""

    strip: ClassVar[int] = 16

    @abstractmethod
    def group_weight(self, *operands: Any) -> ops.GroupWeight:
        """The weight as the operator takes it, from what `operands` names."""

    def multiply(self, layer: Any, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        codes = layer.scheme.activations.signed_codes
        if codes is None:
            return super().multiply(layer, x, activation)
        *names, _ = self.operands
        buffers, parameters = layer._buffers, layer._parameters  # as Int8 does, and for the same reason
        if buffers["packed"] is None:
            operands = self._operands_on_use(layer)
        else:
            operands = *(buffers[name] for name in names), layer.out_features
        bias = parameters["bias"] if "bias" in parameters else buffers["bias"]
        input_bits, input_group = codes
        return self._product(input_bits, input_group, x, operands, bias, activation)

    def rows(self, layer: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return ops.embedding_groups(ids, self.group_weight(*self._operands(layer)), layer.in_features, dtype)

    def layer_rows(self, layer: Any, begin: int, end: int) -> torch.Tensor:
        if layer.scheme.activations.signed_codes is None:
            return super().layer_rows(layer, begin, end)
        weight = self.group_weight(*self.operands_of(layer))
        return ops.dequantize_group_rows(weight, layer.in_features, begin, end)

    def kernel(self, activations: Any) -> Kernel | None:
        codes = activations.signed_codes
        return None if codes is None else partial(self._product, *codes)

    def _product(
        self,
        input_bits: int,
        input_group: int,
        x: torch.Tensor,
        operands: tuple[Any, ...],
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        return ops.linear_groups(x, self.group_weight(*operands), bias, input_bits, input_group, activation)

    def _operands(self, layer: Any) -> tuple[Any, ...]:
        return (self._operands_on_use if layer._buffers["packed"] is None else self.operands_of)(layer)

    def _operands_on_use(self, layer: Any) -> tuple[Any, ...]:
        """Packs for good, except on the meta device and while a graph is traced, where a module must stay as it is."""
        codes = layer._parameters[self.replaced[0]]
        if codes.is_meta or torch.compiler.is_compiling():
            n, k = layer.out_features, layer.in_features
            held = self.pack(layer.canonical_tensors(), n, k)
            return *(held.get(name) for name in self.operands[:-1]), n
        return self.operands_of(layer)


@dataclass(frozen=True)
class CodebookFormat(GroupFormat, ABC):
    """An index into a table of sixteen values for each weight, and a scale for each block of neighbours in a row.

    `weight_packed` uint8 [n, ceil(k / 2)] holds the indices, two in a byte, that of 0.0 behind an odd last one.
    The last block of a row may be short. What the scales are is each format's own; docs/numerics.md, eq. 80 to 86.

    Packed: `packed` uint8, planes of 4 bits; `packed_scale` [ceil(n / 16), blocks, 16], the scales in a type that holds
    them exactly; `packed_column_scale` float32 [n], what a unit of the table's integers is worth.
    """

    codebook: ClassVar[Codebook]
    reach: ClassVar[float]  # the largest |weight| of a block, in scales
    high_first: ClassVar[bool] = False  # whether the first of two indices lies in the high half of its byte

    held: ClassVar[tuple[str, ...]] = ("packed", "packed_scale", "packed_column_scale")
    operands: ClassVar[tuple[str, ...]] = (*held, "out_features")
    bits: ClassVar[int] = 4
    stored_bits: ClassVar[int] = 4

    @property
    @abstractmethod
    def granularity(self) -> PerGroup: ...

    @abstractmethod
    def scale_forms(self, n: int, k: int) -> dict[str, TensorForm]:
        """The tensors of the scales."""

    @abstractmethod
    def scale_of(self, tensors: Tensors) -> torch.Tensor:
        """Float32 [n, blocks], what the tensors stand for."""

    @abstractmethod
    def packed_scale(self, tensors: Tensors) -> torch.Tensor:
        """What kernels read as the scales, [n, blocks] of any float type. A scale may have another factor for all."""

    def column_scale(self, tensors: Tensors) -> float | torch.Tensor:
        """This factor, times the step of the table."""
        return self.codebook.step

    @abstractmethod
    def unpacked_scale(self, held: Tensors, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of the scales that packing has replaced, from what `packed_scale` gave."""

    def stored_qparams(self, q: QParams) -> CodebookQParams:
        if isinstance(q, CodebookQParams) and q.stored is not None:
            return q
        return self.qparams_of(q.scale * self.reach)

    @abstractmethod
    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        """Those for blocks whose largest |weight| is `absmax` float32 [n, blocks]."""

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        packed = TensorForm((n, -(-k // 2)), torch.uint8, (torch.uint8,))
        return {"weight_packed": packed, **self.scale_forms(n, k)}

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        return {"weight_packed": self._joined(q.codes), **(self.stored_qparams(q.qparams).stored or {})}

    def _joined(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [n, k], two in a byte."""
        codes = F.pad(codes, (0, codes.shape[1] % 2), value=self.codebook.zero)
        high, low = (codes[:, ::2], codes[:, 1::2]) if self.high_first else (codes[:, 1::2], codes[:, ::2])
        return high << 4 | low

    def _codes(self, tensors: Tensors, k: int) -> torch.Tensor:
        packed = tensors["weight_packed"].detach()
        halves = [packed >> 4, packed & 15]
        return torch.stack(halves if self.high_first else halves[::-1], dim=-1).flatten(1)[:, :k]

    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        stored = {name: tensors[name].detach() for name in self.scale_forms(n, k)}
        q = codebook_qparams(self.codebook, self.scale_of(stored), self.granularity, stored)
        return QuantizedTensor(self._codes(tensors, k), q)

    def qparams(self, weight: torch.Tensor) -> CodebookQParams:
        absmax = self.granularity.to_rows(weight.detach()).abs().amax(1).float()
        if torch.compiler.is_compiling():
            torch._assert_async(absmax.isfinite().all(), f"{self.name}: the weight holds NaN or Inf")
        elif not absmax.isfinite().all():
            raise ValueError(f"{self.name}: the weight holds NaN or Inf")
        return self.qparams_of(absmax.reshape(self.granularity.qparams_shape(weight.shape)))

    # --- the packed form --------------------------------------------------------------------------------------------

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        codes = ops.pack_planes(self._codes(tensors, k), 4)
        ones = torch.ones(n, dtype=torch.float32, device=codes.device)
        return {
            "packed": on_huge_pages(codes),
            "packed_scale": to_strips(self.packed_scale(tensors)),
            "packed_column_scale": ones * self.column_scale(tensors),
        }

    def unpack(self, held: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        codes = ops.unpack_planes(held["packed"], n, k)
        scales = self.unpacked_scale(held, from_strips(held["packed_scale"], n))
        return {"weight_packed": self._joined(codes), **scales}

    def group_weight(self, *operands: Any) -> ops.GroupWeight:
        packed, scale, column_scale, n = operands
        table, offset = self.codebook.unsigned, self.codebook.offset
        size = self.granularity.group_size
        return ops.GroupWeight(packed, scale, None, None, table, column_scale, n, 4, size, offset)

    def rows(self, layer: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values themselves, where a product reads multiples of the table's step."""
        packed, scale, _, n = self._operands(layer)
        k, size = layer.in_features, self.granularity.group_size
        codes = ops.embedding_groups(ids, ops.group_weight(packed, n=n, bits=4, group_size=0, offset=0), k)
        scales = self.exact_scale(rows_of_strips(scale, ids), layer).repeat_interleave(size, -1)
        return (self.codebook.lookup(codes) * scales[..., :k]).to(dtype)

    def exact_scale(self, packed_scale: torch.Tensor, layer: Any) -> torch.Tensor:
        """Float32, what scales of `layer` that lie in memory as `packed_scale` are worth."""
        return packed_scale.float()
