# SPDX-License-Identifier: Apache-2.0
"""Eight bits: a byte for each weight and one scale for each output channel, for the kernels of the layout S16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .. import ops
from ..base.float_types import FLOAT_DTYPES
from ..runtime import huge_pages
from ..tensors.forms import TensorForm, positive
from ..tensors.granularity import Granularity, PerChannel
from ..tensors.qparams import QParams, QuantizedTensor
from .base import Kernel, Tensors, WeightFormat, differs

# Of compressed-tensors: how these weights are described.
ARGUMENTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}


@dataclass(frozen=True)
class Int8(WeightFormat):
    """`weight` int8 [n, k], codes -127 .. 127, and `weight_scale` float32 [n, 1]: value = scale * code.

    Packed: `packed` int8, the layout of docs/packed_format.md, and `column_sum` int32, the sum of each row's codes,
    behind which AVX2 has a list (`ops.list_saturating`).
    bits     8, or 7 for codes -63 .. 63: as large in memory and in files, and 6 dB less accurate. AVX2 multiplies them
             faster, other instruction sets do not
    raises   TypeError, ValueError for other bits
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """

    held: ClassVar[tuple[str, ...]] = ("packed", "column_sum")
    operands: ClassVar[tuple[str, ...]] = ("packed", "column_sum", "weight_scale")
    strip: ClassVar[int] = 16
    has_row_scales: ClassVar[bool] = True
    stored_as: ClassVar[str] = "int-quantized"
    least_bits: ClassVar[int] = 7

    bits: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool):
            raise TypeError(f"{self.name}: bits must be an int, got {self.bits!r}")
        if not self.least_bits <= self.bits <= 8:
            raise ValueError(f"{self.name}: bits must be in {self.least_bits} .. 8, got {self.bits}")

    @property
    def granularity(self) -> Granularity:
        return PerChannel(0)

    @property
    def stored_bits(self) -> int:
        return 8

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        return {
            "weight": TensorForm((n, k), torch.int8, (torch.int8,)),
            "weight_scale": TensorForm((n, 1), torch.float32, FLOAT_DTYPES, 1.0, positive),
        }

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        codes = tensors["weight"]
        if codes.dim() != 2:
            raise ValueError(f"QuantLinear: codes must be a matrix [n, k], got shape {tuple(codes.shape)}")
        n, k = codes.shape
        return n, k

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        return {"weight": q.codes, "weight_scale": q.scale[:, None]}

    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        scale = tensors["weight_scale"].detach().reshape(-1)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return QuantizedTensor(
            tensors["weight"].detach(), QParams(scale, zero_point, -self.qmax, self.qmax, self.granularity)
        )

    def row_scales(self, tensors: Tensors) -> torch.Tensor | None:
        return tensors["weight_scale"].detach().float().reshape(-1)

    def part_of(self, name: str) -> str:
        return "other" if name == "column_sum" else super().part_of(name)

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        return n, 1

    def qparams(self, weight: torch.Tensor) -> QParams:
        scale, zero_point = ops.choose_qparams(self.granularity.to_rows(weight), -self.qmax, self.qmax, True)
        return QParams(scale, zero_point, -self.qmax, self.qmax, self.granularity)

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        codes = tensors["weight"].detach()
        packed = huge_pages.empty(ops.packed_shape(n, k))
        return {"column_sum": _with_list(packed, ops.pack_weight_into(codes, packed)), "packed": packed}

    def unpack(self, held: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        return {"weight": ops.unpack_weight(held["packed"], n, k)}

    def multiply(self, layer: Any, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        product = layer.scheme.activations.int8_product
        if product is None:
            return super().multiply(layer, x, activation)
        # Reading these dicts costs half of what attributes do, each of which goes through nn.Module.__getattr__.
        buffers, parameters = layer._buffers, layer._parameters
        packed = buffers["packed"]
        if packed is None:
            operands = self._operands_on_use(layer)
        else:
            operands = packed, buffers["column_sum"], parameters["weight_scale"]
        bias = parameters["bias"] if "bias" in parameters else buffers["bias"]  # codes of a bias are a buffer
        return product(x, operands, bias, activation, layer.input_tensors() if layer.input_names else ())

    def rows(self, layer: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        packed, scale = layer._buffers["packed"], layer._parameters["weight_scale"]
        if packed is None:
            packed, *_ = self._operands_on_use(layer)
        # The layout of these codes is that of groups of 8 bits; here a row is one group.
        numbers: dict[str, Any] = {"n": layer.out_features, "bits": 8, "group_size": 0, "offset": 128}
        weight = ops.group_weight(packed, **numbers, column_scale=scale.detach().reshape(-1))
        return ops.embedding_groups(ids, weight, layer.in_features, dtype)

    def kernel(self, activations: Any) -> Kernel | None:
        return activations.int8_product

    def codes_kernel(self, activations: Any) -> Kernel | None:
        return _product_of_codes if activations.has_row_codes else None

    def joinable(self, name: str, operand: torch.Tensor, n: int) -> torch.Tensor:
        return operand[:n] if name == "column_sum" else operand

    def joined_operands(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, column_sum, weight_scale = operands
        return packed, _with_list(packed, column_sum), weight_scale

    def compressed_tensors(self) -> dict[str, Any] | None:
        return dict(ARGUMENTS)

    @classmethod
    def from_compressed_tensors(cls, weights: Mapping[str, Any]) -> WeightFormat | None:
        strategy = "tensor" if weights.get("strategy") == "tensor" else "channel"
        return None if cls is not Int8 or differs(weights, {**ARGUMENTS, "strategy": strategy}) else cls()

    def adapt(self, layer: str, tensors: dict[str, torch.Tensor]) -> WeightFormat:
        zero_point = tensors.pop(f"{layer}.weight_zero_point", None)
        if zero_point is not None and zero_point.any():
            raise ValueError(
                f"load: {layer}.weight has zero points; octavo computes with symmetric weights only"
            )
        weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
        if weight is not None and scale is not None and scale.numel() == 1 and weight.dim() == 2:
            tensors[f"{layer}.weight_scale"] = scale.reshape(1, 1).expand(len(weight), 1)
        return self

    def _operands_on_use(self, layer: Any) -> tuple[torch.Tensor, ...]:
        """Packs for good, except on the meta device and while a graph is traced, where a module must stay as it is."""
        codes = layer._parameters["weight"]
        if codes.is_meta or torch.compiler.is_compiling():
            return *ops.pack_weight(codes.detach()), layer._parameters["weight_scale"]
        return self.operands_of(layer)


def _with_list(packed: torch.Tensor, column_sum: torch.Tensor) -> torch.Tensor:
    """`column_sum` with the list that AVX2 reads, or itself and no copy if there is none."""
    listed = ops.list_saturating(packed, column_sum)
    return listed if len(listed) > len(column_sum) else column_sum


def _product_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    return ops.linear_codes(codes, scale, *operands, bias, activation)


@dataclass(frozen=True)
class CoarseInt8(Int8):
    """As Int8, with the codes that `bits` bits would have. Nothing gets smaller: a code takes a byte all the same.

    It is for studies and for training: it shows what fewer bits cost, and what training wins back.
    bits     2 .. 8
    raises   TypeError, ValueError for other bits
    """

    least_bits: ClassVar[int] = 2

    bits: int = field()
