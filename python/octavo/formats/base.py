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
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from .. import ops
from ..base.configs import Config
from ..runtime import huge_pages
from ..tensors.forms import TensorForm
from ..tensors.granularity import Granularity
from ..tensors.qparams import QParams, QuantizedTensor

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

    def layer_rows(self, layer: Any, begin: int, end: int) -> torch.Tensor:
        """Rows `begin`, a multiple of 16, to `end` of what `layer` multiplies by, float32 [end - begin, k].

        Here: of the whole weight, which then is in memory for a moment.
        """
        return self.layer_weight(layer)[begin:end]

    def scaled_rows(self, tensors: Tensors, factors: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """The tensors with each row times its factor float32 [n], if that needs no rounding of codes; else None."""
        return None

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
