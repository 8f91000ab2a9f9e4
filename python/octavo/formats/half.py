# SPDX-License-Identifier: Apache-2.0
"""Sixteen bits: bfloat16 or float16 weights as they are, half the memory of float32, multiplied in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from .. import ops
from ..runtime import huge_pages
from ..tensors.forms import TensorForm
from ..tensors.granularity import Granularity, PerTensor
from ..tensors.half import Rounding
from ..tensors.qparams import QuantizedTensor
from .base import Kernel, Tensors, WeightFormat

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Half(WeightFormat):
    """`weight` [n, k] in `dtype`, as a checkpoint has it; there are no scales.

    Packed: `packed`, the same values in the layout H16 of docs/packed_format.md.
    dtype    "bfloat16" or "float16"
    raises   ValueError for another dtype
    source   ours; docs/numerics.md
    """

    dtype: str = "bfloat16"

    operands: ClassVar[tuple[str, ...]] = ("packed",)
    strip: ClassVar[int] = 16
    bits: ClassVar[int] = 16
    stored_bits: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if self.dtype not in HALVES:
            raise ValueError(f"Half: dtype must be 'bfloat16' or 'float16', got {self.dtype!r}")

    @property
    def granularity(self) -> Granularity:
        return PerTensor()

    @property
    def half(self) -> torch.dtype:
        return HALVES[self.dtype]

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        return {"weight": TensorForm((n, k), self.half, (self.half,))}

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        weight = tensors["weight"]
        if weight.dim() != 2:
            raise ValueError(f"QuantLinear: weight must be a matrix [n, k], got shape {tuple(weight.shape)}")
        n, k = weight.shape
        return n, k

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        return {"weight": q.codes}

    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        return QuantizedTensor(tensors["weight"].detach(), Rounding.to(self.half))

    def qparams(self, weight: torch.Tensor) -> Rounding:
        """Raises ValueError for NaN or Inf, and for finite weights that `dtype` makes Inf of."""
        low, high = weight.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError("the weight holds NaN or Inf")
        reason = self.reason_to_refuse(max(-low.item(), high.item()))
        if reason:
            raise ValueError(reason)
        return Rounding.to(self.half)

    def reason_to_refuse(self, largest: float) -> str:
        if torch.tensor(largest).to(self.half).isfinite():
            return ""
        remedy = "use dtype='bfloat16'" if self.dtype == "float16" else "keep the layer in float32"
        return (
            f"the weight holds {largest:g}, more than {self.dtype} can: its largest number is "
            f"{torch.finfo(self.half).max:g}; {remedy}"
        )

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        strips, *line = ops.packed_half_shape(n, k)
        packed = huge_pages.empty((strips, k, 2 * line[-1])).view(self.half)
        ops.pack_half_into(tensors["weight"], packed)
        return {"packed": packed}

    def unpack(self, held: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        return {"weight": ops.unpack_half(held["packed"], n, k)}

    def multiply(self, layer: Any, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        product = layer.scheme.activations.half_product
        if product is None:
            return super().multiply(layer, x, activation)
        packed = layer._buffers["packed"]
        if packed is None:
            packed = self._packed_on_use(layer)
        return product(x, packed, layer._parameters["bias"], layer.out_features, activation)

    def rows(self, layer: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        packed = layer._buffers["packed"]
        if packed is None:
            packed = self._packed_on_use(layer)
        return ops.embedding_half(ids, packed, layer.out_features, dtype)

    def kernel(self, activations: Any) -> Kernel | None:
        return None if activations.half_product is None else partial(_product, activations)

    def operands_of(self, layer: Any) -> tuple[Any, ...]:
        return *super().operands_of(layer), layer.out_features

    def _packed_on_use(self, layer: Any) -> torch.Tensor:
        """Packs for good, except on the meta device and while a graph is traced, where a module must stay as it is."""
        weight = layer._parameters["weight"]
        if weight.is_meta or torch.compiler.is_compiling():
            return ops.pack_half(weight.detach())
        layer.pack_()
        return layer._buffers["packed"]


def _product(
    activations: Any,
    x: torch.Tensor,
    operands: tuple[Any, ...],
    bias: torch.Tensor | None,
    activation: str | None = None,
    inputs: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """Of a layer, whose operands say how many outputs it has, or of layers side by side, which fill whole strips."""
    packed, *outputs = operands
    n = outputs[0] if outputs else len(packed) * packed.shape[-1]
    return activations.half_product(x, packed, bias, n, activation)
