# SPDX-License-Identifier: Apache-2.0
"""What an adapter is, and AdaptedLinear: a frozen linear layer with adapters around it.

An `Adapter` is what a user chooses, a config. At each layer it becomes a `LayerAdapter`, a module that holds what is
trained there and says what that does to the layer's input and output. The layer itself, quantized or float, is `base`:
nothing is written to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ...base.configs import Config, require_int
from ...base.patterns import matches, pattern_list
from ..linear import QuantLinear
from ..replacements import bias_of, features_of, matrix_of


@dataclass(frozen=True)
class Adapter(Config, ABC):
    """What all adapters have: `targets`, patterns of layer names, or None for every quantized layer.

    A pattern is fnmatch, such as "*.q_proj", or a regular expression after "re:"; it may name float linear layers, too.
    """

    targets: Any = field(default=None, kw_only=True)

    peft_type: ClassVar[str]  # the value of peft_type in an adapter_config.json

    def __post_init__(self) -> None:
        if self.targets is not None:
            patterns = tuple(pattern_list(f"{self.name}: targets", self.targets))
            object.__setattr__(self, "targets", patterns)

    @abstractmethod
    def layer(self, name: str, base: nn.Module) -> LayerAdapter:
        """A new adapter for `base`, a linear layer called `name`. It changes nothing until it is trained.

        raises   ValueError if the layer cannot have one
        """

    # --- files of PEFT ----------------------------------------------------------------------------------------------

    @abstractmethod
    def to_peft(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        """What adapter_config.json says of this adapter, whose modules at each layer are `layers`."""

    @classmethod
    @abstractmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> Adapter:
        """The adapter that an adapter_config.json describes, for the layers and tensors that the file beside it holds.

        raises   ValueError for what this version does not compute
        """

    @classmethod
    def peft_tensors(
        cls, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors as `LayerAdapter.fill_` takes them, by layer. Raises ValueError if they contradict `fields`."""
        return {name: dict(tensors) for name, tensors in layers.items()}


class LayerAdapter(nn.Module, ABC):
    """One adapter at one linear layer: y = after(x, base(before(x))).

    `strength` is a factor of the adapter's effect: 1.0 as it was trained, 0.0 none.
    """

    # {parameter: how it is called behind the layer's name in files of PEFT}
    file_names: ClassVar[dict[str, str]]

    def summary(self) -> str:
        """What it is, in a few words."""
        return type(self).__name__.removesuffix("Layer")

    def before(self, x: torch.Tensor, strength: float) -> torch.Tensor:
        """What the base layer reads in the place of x [..., k]."""
        return x

    def after(self, x: torch.Tensor, y: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        """What the layer gives in the place of y [..., n], for the input x [..., k] that it was given."""
        return y

    @abstractmethod
    def merged(self, weight: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        """The weight float32 [n, k] with which a layer does what `after` does to a layer with the weight `weight`.

        base   the layer that the adapter hangs on
        """

    def merged_bias(self, bias: torch.Tensor | None, strength: float, base: nn.Module) -> torch.Tensor | None:
        """The same of the bias, float32 [n] or None."""
        return bias

    def merged_input(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        """The weight float32 [n, k] with which a layer does what `before` does to one with the weight `weight`."""
        return weight

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is saved, by the names of `file_names`."""
        own = dict(self.named_parameters())
        return {self.file_names[name]: own[name].detach() for name in self.file_names if name in own}

    def fill_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies what `tensors` gave. Shapes have been checked."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, file_name in self.file_names.items():
                if name in own and file_name in tensors:
                    own[name].copy_(tensors[file_name])


class AdaptedLinear(nn.Module):
    """A linear layer and its adapters; `adapt_` puts it into the layer's place, `remove_adapters_` takes it out again.

    base       the layer, frozen; what is asked of this module and is not here, such as `weight`, is read there
    adapters   all adapters by name
    configs    {name: what the user chose}
    active     {name: strength} of those that count, in the order in which they are applied
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.configs: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}
        self.training = base.training

    def add_(self, name: str, config: Adapter, adapter: LayerAdapter) -> None:
        """Adds an adapter, which becomes the only one that counts."""
        self.adapters[name] = adapter.train(self.training)
        self.configs[name] = config
        self.active = {name: 1.0}

    def remove_(self, name: str) -> None:
        """Takes an adapter off; does nothing if there is none of this name."""
        if name in self.adapters:
            del self.adapters[name]
            del self.configs[name]
            self.active.pop(name, None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., k] to [..., n] in the dtype that the base layer gives."""
        active: list[tuple[Any, float]] = [
            (self.adapters[name], strength) for name, strength in self.active.items()
        ]
        x = input
        for adapter, strength in active:
            x = adapter.before(x, strength)
        y = self.base(x)
        for adapter, strength in active:
            y = adapter.after(input, y, strength, self.base)
        return y

    def __getattr__(self, name: str) -> Any:  # reached only when the ordinary lookup fails
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    def extra_repr(self) -> str:
        return (
            ", ".join(f"{name}: {strength:g}" for name, strength in self.active.items())
            or "no adapter active"
        )


def sizes_of(layer: Any) -> tuple[int, int]:
    """n and k of a linear layer, quantized or float."""
    k, n = (layer.in_features, layer.out_features) if isinstance(layer, QuantLinear) else features_of(layer)
    return n, k


def bias_values(layer: Any) -> torch.Tensor | None:
    """The bias [n] of a linear layer as floats, detached; None without one."""
    bias = layer.float_bias() if isinstance(layer, QuantLinear) else bias_of(layer)
    return None if bias is None else bias.detach()


def weight_rows(layer: Any, begin: int, end: int) -> torch.Tensor:
    """Rows `begin` to `end` of a linear layer's weight, float32 [end - begin, k], detached; a copy if quantized."""
    if isinstance(layer, QuantLinear):
        return layer.dequantize_rows(begin, end)
    return matrix_of(layer).detach()[begin:end].float()


def value_for(patterns: Any, name: str, otherwise: Any) -> Any:
    """The value of the first of `patterns`, pairs (pattern, value), that matches `name`."""
    return next((value for pattern, value in patterns if matches(pattern, [name])), otherwise)


def require_rank(what: str, value: Any) -> None:
    """Raises TypeError, ValueError unless `value` is a positive int."""
    require_int(what, value)
    if value < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")


def require_number(what: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises TypeError, ValueError unless low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number, got {value!r}")
    if not low <= value < high:
        below = "" if high == float("inf") else f" and below {high:g}"
        raise ValueError(f"{what} must be at least {low:g}{below}, got {value}")
