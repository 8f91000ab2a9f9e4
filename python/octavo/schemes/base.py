# SPDX-License-Identifier: Apache-2.0
"""What every scheme is: a frozen dataclass that says how a layer's weight becomes integers and how it then computes.

A scheme is one file in this folder. It overrides `linear`, and what else differs from int8 weights with one scale for
each output channel; fields are plain values, checked in __post_init__, so that a scheme can be written to a file.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from ..nn import QuantLinear
from ..qparams import FLOAT_DTYPES, Granularity, PerChannel, quantize


@dataclass(frozen=True)
class Scheme(ABC):
    """How linear layers are quantized. Instances compare by value and can be dictionary keys."""

    bits: ClassVar[int] = 8
    granularity: ClassVar[Granularity] = PerChannel(0)

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """The instances that `octavo study` measures. Here: each combination of boolean fields, the defaults first."""
        flags = {field.name: field.default for field in fields(cls) if isinstance(field.default, bool)}
        choices = itertools.product(*((default, not default) for default in flags.values()))
        return [cls(**dict(zip(flags, values, strict=True))) for values in choices]

    @abstractmethod
    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The layer's product: x [..., k] and a packed weight of n rows to [..., n] in x's dtype."""

    def quantize_linear(self, linear: nn.Linear) -> QuantLinear:
        """A packed layer that computes what `linear` does, in integers; `linear` is left as it is.

        raises   ValueError if the weight holds NaN or Inf
        """
        q = quantize(linear.weight, granularity=self.granularity)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = QuantLinear.from_codes(q.codes, q.scale[:, None], bias, self)
        return layer.train(linear.training).pack_()

    def reason_to_keep(self, linear: nn.Linear) -> str | None:
        """Why this scheme cannot serve `linear`, in words for the report; None if it can."""
        weight, bias = linear.weight, linear.bias
        if weight.is_meta:
            return "the weight is on the meta device: load it first"
        if weight.device.type != "cpu":
            return f"the weight is on {weight.device}: octavo runs on the CPU"
        if weight.dtype not in FLOAT_DTYPES:
            return f"the weight is {_short(weight.dtype)}: float32, bfloat16 and float16 are served"
        if bias is not None and bias.dtype not in FLOAT_DTYPES:
            return f"the bias is {_short(bias.dtype)}: float32, bfloat16 and float16 are served"
        if weight.numel() == 0:
            return f"the weight is empty: {list(weight.shape)}"
        return None

    def compressed_tensors_activations(self) -> dict[str, Any] | None:
        """The activations as compressed-tensors' QuantizationArgs say it; None: they stay float."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """{"name": class name, field: value, ...}, JSON; `octavo.schemes.from_dict` reads it back."""
        return {"name": self.name, **asdict(self)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
