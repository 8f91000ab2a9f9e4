# SPDX-License-Identifier: Apache-2.0
"""LoRA: a product of two thin matrices is added to the weight. With it rank-stabilized LoRA and DoRA.

docs/numerics.md, eq. 120 to 122.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ...base.configs import require_flags
from ...base.patterns import pattern_list
from .base import (
    Adapter,
    LayerAdapter,
    bias_values,
    require_number,
    require_rank,
    sizes_of,
    value_for,
    weight_rows,
)

STARTS = ("uniform", "gaussian")
BIASES = ("none", "lora_only", "all")
NORM_ROWS = 256  # of the weight, dequantized at a time


@dataclass(frozen=True)
class LoRA(Adapter):
    """y = base(x) + alpha / r * B @ A @ x, with A [r, k] and B [n, r], which starts as zeros.

    r, alpha          the rank, and how much the product counts
    dropout           share of the elements of x that the adapter does not see while training
    targets           patterns of layer names; None: every quantized layer
    rank_stabilized   alpha / sqrt(r) in the place of alpha / r
    dora              the sum of weight and product is brought to a length for each row, which is trained (DoRA)
    ranks, alphas     {pattern: value} for layers that shall have another r, another alpha; the first match counts
    bias              "lora_only" trains the biases of the adapted layers, "all" those of all linear layers, too
    output_bias       B has a bias, which is trained and counts alpha / r times
    start             what A is made of: "uniform" within 1 / sqrt(k), or "gaussian" with deviation 1 / r
    raises            TypeError, ValueError for other values
    source            Hu et al. 2021 (arXiv:2106.09685), section 4.1; rank_stabilized: Kalajdzievski 2023
                      (arXiv:2312.03732), section 4; dora: Liu et al. 2024 (arXiv:2402.09353), eq. 5 and 11
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    ranks: Any = ()
    alphas: Any = ()
    bias: str = "none"
    output_bias: bool = False
    start: str = "uniform"

    peft_type: ClassVar[str] = "LORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rank("LoRA: r", self.r)
        require_number("LoRA: alpha", self.alpha, 0)
        require_number("LoRA: dropout", self.dropout, 0, 1)
        require_flags(self, "rank_stabilized", "dora", "output_bias")
        for field, choices in (("bias", BIASES), ("start", STARTS)):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"LoRA: {field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}"
                )
        for field in ("ranks", "alphas"):
            pairs = _pairs(f"LoRA: {field}", getattr(self, field))
            object.__setattr__(self, field, pairs)
        if self.dora and self.output_bias:
            raise ValueError("LoRA: dora does not go with output_bias: a length has no place for a bias")
        for pattern, value in self.ranks:
            require_rank(f"LoRA: ranks[{pattern!r}]", value)
        for pattern, value in self.alphas:
            require_number(f"LoRA: alphas[{pattern!r}]", value, 0)

    @property
    def adapts_biases_elsewhere(self) -> bool:
        """Whether linear layers that `targets` does not name have a trained bias as well."""
        return self.bias == "all"

    def rank_of(self, name: str) -> int:
        return value_for(self.ranks, name, self.r)

    def alpha_of(self, name: str) -> float:
        return value_for(self.alphas, name, self.alpha)

    def layer(self, name: str, base: nn.Module) -> LoRALayer:
        r = self.rank_of(name)
        scaling = self.alpha_of(name) / (math.sqrt(r) if self.rank_stabilized else r)
        layer = LoRALayer(*sizes_of(base), r, scaling, self.dropout, self.output_bias)
        layer.start_(self.start)
        if self.bias != "none":
            layer.train_bias_(base)
        if self.dora:
            layer.magnitude = nn.Parameter(row_norms(layer, base))
        return layer

    def bias_layer(self, base: nn.Module) -> BiasLayer:
        """What a layer outside of the targets has, if its bias is trained."""
        return BiasLayer(base)

    # --- files of PEFT ----------------------------------------------------------------------------------------------

    def to_peft(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        ranks = {name: layer.r for name, layer in layers.items() if isinstance(layer, LoRALayer)}
        alphas = {name: self.alpha_of(name) for name in ranks}
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "use_dora": self.dora,
            "bias": self.bias,
            "lora_bias": self.output_bias,
            "init_lora_weights": "gaussian" if self.start == "gaussian" else True,
            "fan_in_fan_out": False,
            "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != self.r},
            "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != self.alpha},
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]]) -> LoRA:
        refuse_fields(fields, UNSERVED)
        r, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
        targets = [name for name, tensors in layers.items() if "lora_A.weight" in tensors]
        ranks = {name: len(layers[name]["lora_A.weight"]) for name in targets}
        alphas = {name: _peft_value(fields.get("alpha_pattern"), name, alpha) for name in targets}
        return cls(
            r=r,
            alpha=alpha,
            dropout=fields.get("lora_dropout", 0.0),
            targets=targets,
            rank_stabilized=bool(fields.get("use_rslora")),
            dora=bool(fields.get("use_dora")),
            ranks={name: own for name, own in ranks.items() if own != r},
            alphas={name: own for name, own in alphas.items() if own != alpha},
            bias=fields.get("bias", "none"),
            output_bias=bool(fields.get("lora_bias")),
            start="gaussian" if fields.get("init_lora_weights") == "gaussian" else "uniform",
        )


# Fields of a LoraConfig that change what is computed, and that this version does not compute.
UNSERVED = (
    *("use_qalora", "use_bdlora", "megatron_config", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "modules_to_save", "velora_config"),
    *("monteclora_config", "kasa_config"),
)


class LoRALayer(LayerAdapter):
    """A [r, k], B [n, r] and, if they are trained, `B_bias` [n], `bias` [n] and DoRA's `magnitude` [n], all float32."""

    file_names: ClassVar[dict[str, str]] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "B_bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "bias": "bias",
    }

    A: nn.Parameter
    B: nn.Parameter
    B_bias: Any  # a Parameter, or None
    magnitude: Any
    bias: Any

    def __init__(self, n: int, k: int, r: int, scaling: float, dropout: float, output_bias: bool):
        super().__init__()
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.A = nn.Parameter(torch.zeros(r, k, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(n, r, dtype=torch.float32))
        zeros = torch.zeros(n, dtype=torch.float32)
        self.register_parameter("B_bias", nn.Parameter(zeros) if output_bias else None)
        self.register_parameter("bias", None)
        self.register_parameter("magnitude", None)

    @property
    def r(self) -> int:
        return len(self.A)

    def summary(self) -> str:
        return f"{'LoRA' if self.magnitude is None else 'DoRA'} r={self.r}"

    def start_(self, start: str) -> None:
        """A anew, B zeros."""
        with torch.no_grad():
            if start == "gaussian":
                self.A.normal_(std=1 / self.r)
            else:  # what nn.Linear starts with, as PEFT has it
                nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
            self.B.zero_()

    def train_bias_(self, base: nn.Module) -> None:
        """From now on the layer has a bias of its own, which starts as that of `base`, if that has one."""
        original = bias_values(base)
        if original is not None:
            self.bias = nn.Parameter(original.float().clone())

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * (B @ A @ x + B_bias) [..., n], in A's dtype, or that of autocast."""
        return F.linear(F.linear(x, self.A), self.B, self.B_bias) * self.scaling

    def after(self, x: torch.Tensor, y: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        seen = self.dropout(x.to(self.A.dtype))
        if self.magnitude is None:
            more = self.product(seen)
        else:
            more = self._directed(
                seen, y, base, is_whole=isinstance(self.dropout, nn.Identity) or not self.training
            )
        if self.bias is not None:
            more = more + (self.bias - _original_bias(base))
        return (y + (more if strength == 1 else strength * more)).to(y.dtype)

    def _directed(self, x: torch.Tensor, y: torch.Tensor, base: nn.Module, is_whole: bool) -> torch.Tensor:
        """What DoRA adds to y = base(x): the rows of weight + scaling * B @ A with the length `magnitude`, less y.

        is_whole   nothing of x was dropped; otherwise the base layer is asked again
        The length of the rows is a constant for the gradient: section 4.3 of the paper.
        """
        factor = self._factor(base)
        product = y if is_whole else base(x.to(y.dtype))
        bias = bias_values(base)
        if bias is not None:
            product = product - bias.to(product.dtype)
        return (factor - 1) * product + factor * self.product(x)

    def _factor(self, base: nn.Module) -> torch.Tensor:
        """By which DoRA multiplies the rows of weight + scaling * B @ A, float32 [n]."""
        return self.magnitude / row_norms(self, base)

    def merged(self, weight: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            delta = self.scaling * (self.B @ self.A)
            if self.magnitude is not None:
                factor = self._factor(base)[:, None]
                delta = (factor - 1) * weight + factor * delta
            return weight + strength * delta

    def merged_bias(self, bias: torch.Tensor | None, strength: float, base: nn.Module) -> torch.Tensor | None:
        with torch.no_grad():
            merged = bias
            if (
                self.magnitude is not None and bias is not None
            ):  # what an adapter before this one has added to it
                merged = bias + strength * (self._factor(base) - 1) * (bias - _original_bias(base))
            if self.B_bias is not None:
                more = strength * self.scaling * self.B_bias
                merged = more if merged is None else merged + more
            if self.bias is not None and merged is not None:
                merged = merged + strength * (self.bias - _original_bias(base))
            return merged


class BiasLayer(LayerAdapter):
    """A layer that has no adapter but a trained bias [n]."""

    file_names: ClassVar[dict[str, str]] = {"bias": "bias"}

    def __init__(self, base: nn.Module):
        super().__init__()
        original = bias_values(base)
        if original is None:
            raise ValueError("the layer has no bias that could be trained")
        self.bias = nn.Parameter(original.float().clone())

    def summary(self) -> str:
        return "bias"

    def after(self, x: torch.Tensor, y: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        return (y + strength * (self.bias - _original_bias(base))).to(y.dtype)

    def merged(self, weight: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        return weight

    def merged_bias(self, bias: torch.Tensor | None, strength: float, base: nn.Module) -> torch.Tensor | None:
        return None if bias is None else bias + strength * (self.bias.detach() - _original_bias(base))


def row_norms(layer: LoRALayer, base: nn.Module) -> torch.Tensor:
    """The length of each row of weight + scaling * B @ A, float32 [n]; a few rows are dequantized at a time."""
    with torch.no_grad():
        n, step = len(layer.B), NORM_ROWS
        norms = [
            (
                weight_rows(base, begin, min(begin + step, n))
                + layer.scaling * (layer.B[begin : begin + step] @ layer.A)
            ).norm(dim=1)
            for begin in range(0, n, step)
        ]
        return torch.cat(norms) if norms else torch.zeros(0)


def refuse_fields(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises ValueError if an adapter_config.json sets one of the fields `names`."""
    for name in names:
        if fields.get(name):
            raise ValueError(
                f"{name} is {fields[name]!r}, which octavo does not compute; use peft with the float model"
            )


def _original_bias(base: Any) -> torch.Tensor:
    bias = bias_values(base)
    return torch.zeros(()) if bias is None else bias.float()


def _pairs(what: str, values: Any) -> tuple[tuple[str, Any], ...]:
    pairs = values.items() if isinstance(values, Mapping) else values
    try:
        found = tuple((pattern, value) for pattern, value in pairs)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a dict {{pattern: value}}, got {values!r}") from None
    pattern_list(what, [pattern for pattern, _ in found])
    return found


def _exactly(name: str) -> str:
    """The regular expression with which PEFT finds one layer: it matches the end of names."""
    return "^" + re.escape(name)


def _peft_value(patterns: Any, name: str, otherwise: Any) -> Any:
    """The value that PEFT finds for a layer: of the first key that, as a regular expression, matches the end of its
    name, at a point."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise
