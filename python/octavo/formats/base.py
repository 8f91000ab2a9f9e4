# SPDX-License-Identifier: Apache-2.0
"""What a weight format is: which codes and scales a weight becomes, and how they lie in memory and in files.

A layer in its canonical form holds the tensors that `tensors` names; files hold the same. Packing takes those that
`replaced` names out of the layer, the codes and perhaps their scales: the buffers that `held` names then hold what is
in them in the kernel's layout. No file outside of this folder knows what a format's tensors are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from .. import ops
from ..base.configs import Config
from ..runtime import huge_pages
from ..tensors.codebook import Codebook, CodebookQParams, codebook_qparams
from ..tensors.forms import TensorForm
from ..tensors.granularity import Granularity, PerGroup
from ..tensors.qparams import QParams, QuantizedTensor
from ..tensors.strips import from_strips, rows_of_strips, to_strips

Tensors = Mapping[str, torch.Tensor]
# f(x, operands, bias, activation=None, inputs=()): the product of x [..., k] and `operands`, [..., n] in x's dtype.
#   activation   None or the name of what is done to the result before it is rounded
#   inputs       the tensors that the activations keep in the layer, such as the scale of a static input
Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class WeightFormat(Config, ABC):
    """How weights are stored. Instances without fields are the usual case."""

    held: ClassVar[tuple[str, ...]] = ("packed",)  # buffers of the packed form
    # What the kernel reads of a layer, attributes by name: tensors, numbers that add up, or None. And how many outputs
    # lie together: layers whose outputs fill whole strips can lie side by side and be multiplied as one.
    operands: ClassVar[tuple[str, ...]] = ()
    strip: ClassVar[int] = 1
    has_row_scales: ClassVar[bool] = False  # whether `row_scales` gives them

    @property
    @abstractmethod
    def granularity(self) -> Granularity:
        """Which weights share a scale."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of one code, as far as its values reach."""

    @property
    @abstractmethod
    def stored_bits(self) -> int:
        """Bits that one code takes in memory and in files."""

    @property
    def has_zero_points(self) -> bool:
        """Whether code 0 may stand for another value than 0. Such scales cannot be learned."""
        return False

    @property
    def fixed_scales(self) -> str:
        """Why scales cannot be learned, in words that go on "the scales ..."; "" if they can."""
        return ""

    @property
    def replaced(self) -> tuple[str, ...]:
        """The tensors of the canonical form that packing replaces, the codes first."""
        return ("weight",)

    # --- the canonical form -----------------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        """The tensors of a layer whose float weight is [n, k], by name, the codes first, then the scales."""

    @abstractmethod
    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The canonical form of a weight [n, k] that `qparams` has quantized; tensors are shared where they can be."""

    @abstractmethod
    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        """The inverse of `store`."""

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        """(n, k) of the float weight that `tensors` stand for. Raises ValueError if they do not tell."""
        raise ValueError(f"{self.name}: the tensors do not tell the shape of the weight; give shape=(n, k)")

    def dequantize(
        self, tensors: Tensors, n: int, k: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weight [n, k] as a new float matrix."""
        return self.read(tensors, n, k).dequantize(dtype)

    def layer_weight(self, layer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same for `layer`, a QuantLinear of this format, packed or not."""
        n, k = layer.out_features, layer.in_features
        return self.dequantize(layer.canonical_tensors(), n, k, dtype)

    def row_scales(self, tensors: Tensors) -> torch.Tensor | None:
        """The scale of each row, float32 [n], if a row has a single one."""
        return None

    def part_of(self, name: str) -> str:
        """What the bytes of a layer's tensor are: "codes", "scales", "zero_points" or "other"."""
        if "scale" in name:
            return "scales"
        if "zero_point" in name or "minimum" in name:
            return "zero_points"
        return "codes" if name == self.replaced[0] or name in self.held else "other"

    # --- from floats ------------------------------------------------------------------------------------------------

    @abstractmethod
    def qparams(self, weight: torch.Tensor) -> QParams:
        """The scales that cover the range of `weight` [n, k]. Raises ValueError for NaN or Inf."""

    def stored_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """`scale` float32 as the canonical form can hold it, float32 again: codes are chosen with that."""
        return scale

    def stored_qparams(self, q: QParams) -> QParams:
        """`q` with scales that the canonical form can hold: a method may have changed those of `qparams`."""
        return replace(q, scale=self.stored_scale(q.scale))

    def reason_to_refuse(self, largest: float) -> str:
        """Why weights of size up to `largest` cannot be stored, in words with the remedy; "" if they can."""
        return ""

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """The shape of scales that are learned."""
        return self.granularity.qparams_shape((n, k))

    # --- the packed form: here for formats without a kernel, whose codes stay as they are ----------------------------

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        """The buffers that `held` names, made from the canonical form of a weight [n, k]: copies."""
        return {"packed": tensors[self.replaced[0]].detach().clone()}

    def unpack(self, held: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        """The tensors that `replaced` names, in the canonical form, from the packed one."""
        return {self.replaced[0]: held["packed"]}

    # --- the product ------------------------------------------------------------------------------------------------

    def multiply(self, layer: Any, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        """What `layer`, a QuantLinear of this format, gives for x [..., k]; `activation` as a Kernel takes it.

        Here: a product of floats, for formats and activations that no kernel multiplies.
        """
        x = layer.scheme.activations.fake_quantize(x, layer)
        bias = layer.float_bias()
        y = F.linear(x, layer.code_weight(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if activation is None else ops.activate(y, activation)

    def rows(self, layer: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` [...] of the weight of `layer`, a QuantEmbedding, [..., k] in `dtype`. Raises: IndexError."""
        return F.embedding(ids, layer.code_weight(dtype))

    def kernel(self, activations: Any) -> Kernel | None:
        """What multiplies this format and `activations`; None if there is no kernel for the two."""
        return None

    def codes_kernel(self, activations: Any) -> Kernel | None:
        """The same, f(codes, scale, operands, bias, activation), for x as `ops.add_norm_codes` gives it."""
        return None

    def operands_of(self, layer: Any) -> tuple[Any, ...]:
        """What the kernel reads of `layer`, which is packed first if it is not yet."""
        layer.pack_()
        return tuple(getattr(layer, name) for name in self.operands)

    def joinable(self, name: str, operand: torch.Tensor, n: int) -> torch.Tensor:
        """What of a layer's operand may lie side by side with that of another layer."""
        return operand

    def joined_operands(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the kernel reads of several layers whose operands lie side by side."""
        return operands

    # --- files ------------------------------------------------------------------------------------------------------

    # The layout's name in files of compressed-tensors, "" if they have none; others of theirs that `adapt` can read.
    stored_as: ClassVar[str] = ""
    read_as: ClassVar[tuple[str, ...]] = ()

    def compressed_tensors(self) -> dict[str, Any] | None:
        """The weights as compressed-tensors' QuantizationArgs say it; None if they have no words for this format."""
        return None

    @classmethod
    def from_compressed_tensors(cls, weights: Mapping[str, Any]) -> WeightFormat | None:
        """The format that these QuantizationArgs describe; None if it is not of this class."""
        return None

    def adapt(self, layer: str, tensors: dict[str, torch.Tensor]) -> WeightFormat:
        """Brings the tensors of a layer, by its name, from the forms that compressed-tensors allows to the canonical
        form, in place. Raises ValueError for values that this format does not have.
        returns  this format, or one that differs in what the tensors tell and QuantizationArgs do not
        """
        return self


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


def on_huge_pages(packed: torch.Tensor) -> torch.Tensor:
    """A copy of `packed` in the pages that packed weights share; on the meta device and in a traced graph itself."""
    if packed.is_meta or torch.compiler.is_compiling():
        return packed
    return huge_pages.empty(tuple(packed.shape)).view(packed.dtype).copy_(packed)


def differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether QuantizationArgs mean something else than `wanted`. Fields that are left out have the defaults of
    compressed-tensors."""
    size = found.get("group_size")
    strategy = "token" if found.get("dynamic") else "channel" if size == -1 else "group" if size else "tensor"
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": strategy}
    complete = {**defaults, **{key: value for key, value in found.items() if value is not None}}
    has_blocks = found.get("block_structure") is not None
    other = has_blocks or (None if size == -1 else size) != wanted.get("group_size")
    return other or any(complete[key] != value for key, value in wanted.items())
