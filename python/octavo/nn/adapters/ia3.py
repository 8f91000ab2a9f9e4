# SPDX-License-Identifier: Apache-2.0
"""IA3: a trained factor for each output of a layer, or for each input. docs/numerics.md, eq. 124."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...base.patterns import Patterns, matches, pattern_list
from .base import Adapter, LayerAdapter, sizes_of
from .lora import refuse_fields


@dataclass(frozen=True)
class IA3(Adapter):
    """y = l * base(x), bias included, or y = base(l * x) for the layers that `feedforward` names; l starts as ones.

    targets       patterns of layer names; None: every quantized layer. Usual are keys, values and the last layer of
                  each feed-forward block: ["*.k_proj", "*.v_proj", "*.down_proj"]
    feedforward   patterns of those among them whose input is multiplied, such as "*.down_proj"; None: of none
    raises        TypeError, ValueError for other values
    source        Liu et al. 2022 (arXiv:2205.05638), section 3.3
    """

    feedforward: Patterns = None

    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedforward is not None:
            patterns = tuple(pattern_list("IA3: feedforward", self.feedforward))
            object.__setattr__(self, "feedforward", patterns)

    def layer(self, name: str, base: nn.Module) -> IA3Layer:
        is_input = any(matches(pattern, [name]) for pattern in self.feedforward or ())
        n, k = sizes_of(base)
        return IA3Layer(n, k, is_input)

    # --- files of PEFT ----------------------------------------------------------------------------------------------

    def to_peft(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        feedforward = [name for name, layer in layers.items() if layer.is_input]
        return {"feedforward_modules": feedforward, "init_ia3_weights": True, "fan_in_fan_out": False}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]]) -> IA3:
        refuse_fields(fields, ("modules_to_save",))
        feedforward = [name for name in layers if _ends_with(fields.get("feedforward_modules"), name)]
        return cls(targets=list(layers), feedforward=feedforward or None)


class IA3Layer(LayerAdapter):
    """`factors` float32, [n, 1] of outputs or [1, k] of inputs."""

    file_names: ClassVar[dict[str, str]] = {"factors": "ia3_l"}

    def __init__(self, n: int, k: int, is_input: bool):
        super().__init__()
        self.is_input = is_input
        self.factors = nn.Parameter(torch.ones((1, k) if is_input else (n, 1), dtype=torch.float32))

    def summary(self) -> str:
        return f"IA3, a factor for each {'input' if self.is_input else 'output'}"

    def _strong(self, strength: float) -> torch.Tensor:
        factors = self.factors.flatten()
        return factors if strength == 1 else 1 + strength * (factors - 1)

    def before(self, x: torch.Tensor, strength: float) -> torch.Tensor:
        return (x * self._strong(strength)).to(x.dtype) if self.is_input else x

    def after(self, x: torch.Tensor, y: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        return y if self.is_input else (y * self._strong(strength)).to(y.dtype)

    def merged_input(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        return weight * self._strong(strength).detach() if self.is_input else weight

    def merged(self, weight: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        return weight if self.is_input else weight * self._strong(strength).detach()[:, None]

    def merged_bias(self, bias: torch.Tensor | None, strength: float, base: nn.Module) -> torch.Tensor | None:
        return bias if self.is_input or bias is None else bias * self._strong(strength).detach()


def _ends_with(endings: Any, name: str) -> bool:
    """Whether PEFT's feedforward_modules, a regular expression or a list of endings, name a layer."""
    if isinstance(endings, str):
        return re.fullmatch(endings, name) is not None
    return any(name.endswith(each) for each in endings or ())
