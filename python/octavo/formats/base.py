# SPDX-License-Identifier: Apache-2.0
"""What a weight format is: which codes and scales a weight becomes, and how they lie in memory and in files.

A layer in its canonical form holds the tensors that `tensors` names; files hold the same. A format with a kernel packs
them: the codes leave the layer's parameters, and the buffers that `held` names hold the kernel's layout of them. No
file outside of this folder knows what a format's tensors are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import functional as F

from .. import ops
from ..base.configs import Config
from ..tensors.granularity import Granularity
from ..tensors.qparams import QParams, QuantizedTensor

Tensors = Mapping[str, torch.Tensor]


class TensorForm(NamedTuple):
    """One tensor of a layer's canonical form.

    dtype     in memory; `accepted` are the dtypes that a file may have for it
    fill      what an unfilled layer holds
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    accepted: tuple[torch.dtype, ...]
    fill: float = 0.0


@dataclass(frozen=True)
class WeightFormat(Config, ABC):
    """How weights are stored. Instances without fields are the usual case."""

    codes: ClassVar[str] = "weight"  # the tensor of the canonical form that packing replaces
    held: ClassVar[tuple[str, ...]] = ()  # buffers of the packed form; empty for a format without a kernel
    # What the kernel reads of a layer (nothing, for a format without a kernel), and how many outputs lie together:
    # layers whose outputs fill whole strips can lie side by side and be multiplied as one.
    operands: ClassVar[tuple[str, ...]] = ()
    strip: ClassVar[int] = 1
    granularity: ClassVar[Granularity]
    bits: ClassVar[int]  # of one code, as far as its values reach
    stored_bits: ClassVar[int]  # that one code takes in memory and in files

    # --- the canonical form -----------------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        """The tensors of a layer whose float weight is [n, k], by name, the codes first."""

    @abstractmethod
    def shape(self, tensors: Tensors) -> tuple[int, int]:
        """(n, k) of the float weight that `tensors` stand for. Raises ValueError if they stand for none."""

    @abstractmethod
    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The canonical form of a weight [n, k] that `qparams` has quantized; tensors are shared, not copied."""

    @abstractmethod
    def read(self, tensors: Tensors) -> QuantizedTensor:
        """The inverse of `store`."""

    def dequantize(self, tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [n, k] as a new float matrix."""
        return self.read(tensors).dequantize(dtype)

    def row_scales(self, tensors: Tensors) -> torch.Tensor | None:
        """The scale of each row, float32 [n], if a row has a single one."""
        return None

    # --- from floats ------------------------------------------------------------------------------------------------

    @abstractmethod
    def qparams(self, weight: torch.Tensor) -> QParams:
        """The scales that cover the range of `weight` [n, k]. Raises ValueError for NaN or Inf."""

    # --- the packed form --------------------------------------------------------------------------------------------

    def pack(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The buffers that `held` names, made from the canonical form."""
        raise NotImplementedError(f"{self.name} has no packed form")

    def unpack(self, held: Tensors, n: int, k: int) -> torch.Tensor:
        """The codes of the canonical form, from the packed one."""
        raise NotImplementedError(f"{self.name} has no packed form")

    # --- the product ------------------------------------------------------------------------------------------------

    def multiply(self, layer: Any, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        """What `layer`, a QuantLinear of this format, gives for x [..., k]; `activation` as in `product`.

        Here: a product of floats, for formats that no kernel multiplies.
        """
        tensors = layer.canonical_tensors()
        x = layer.scheme.activations.fake_quantize(x, layer)
        bias = layer.float_bias()
        y = F.linear(x, self.dequantize(tensors, x.dtype), None if bias is None else bias.to(x.dtype))
        return y if activation is None else ops.activate(y, activation)

    def operands_of(self, layer: Any) -> tuple[torch.Tensor, ...]:
        """What the kernel reads of `layer`, which is packed first if it is not yet."""
        layer.pack_()
        return tuple(getattr(layer, name) for name in self.operands)

    def product(
        self,
        activations: Any,
        x: torch.Tensor,
        operands: tuple[torch.Tensor, ...],
        bias: torch.Tensor | None,
        activation: str | None = None,
        inputs: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        """The kernel's product of x [..., k] and `operands`: [..., n] in x's dtype.

        activation   None or the name of what is done to the result before it is rounded
        inputs       the tensors that `activations` keep in the layer, such as the scale of a static input
        """
        raise NotImplementedError(f"{self.name} has no kernel")

    # --- files ------------------------------------------------------------------------------------------------------

    stored_as: ClassVar[str] = (
        ""  # the name of the layout in files of compressed-tensors; "" if they have none for it
    )

    def compressed_tensors(self) -> dict[str, Any] | None:
        """The weights as compressed-tensors' QuantizationArgs say it; None if they have no words for this format."""
        return None

    @classmethod
    def from_compressed_tensors(cls, weights: Mapping[str, Any]) -> WeightFormat | None:
        """The format that these QuantizationArgs describe; None if it is not of this class."""
        return None

    def adapt(self, layer: str, tensors: dict[str, torch.Tensor]) -> None:
        """Brings the tensors of a layer, by its name, from the forms that compressed-tensors allows to the canonical
        form, in place. Raises ValueError for values that this format does not have."""


def differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether QuantizationArgs mean something else than `wanted`. Fields that are left out have the defaults of
    compressed-tensors."""
    strategy = "token" if found.get("dynamic") else "tensor"
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": strategy}
    complete = {**defaults, **{key: value for key, value in found.items() if value is not None}}
    other = complete.get("group_size") not in (None, -1) or complete.get("block_structure") is not None
    return other or any(complete[key] != value for key, value in wanted.items())
