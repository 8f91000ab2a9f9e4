# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: LoRA in the form of singular values, of which training keeps the important ones. docs/numerics.md, eq. 123.

The layers are here; adaptation/rank_allocator.py says which values are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ...base.configs import require_int
from .base import Adapter, LayerAdapter, require_number, require_rank, sizes_of
from .lora import UNSERVED, refuse_fields

DIVISOR_OFFSET = 1e-5  # PEFT divides by init_r plus this
KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Adapter):
    """y = base(x) + alpha / (init_r + 1e-5) * B @ (E * (A @ x)), with A [r, k], E [r] of zeros and B [n, r].

    init_r, target_r   the rank of each layer at the start, and that of a layer at the end, on average over the layers
    total_step         how many steps the training has: octavo.RankAllocator counts them
    alpha, dropout     as LoRA's; alpha 0 stands for init_r, as in PEFT
    targets            patterns of layer names; None: every quantized layer
    warm_up            steps before values are taken away (PEFT's tinit)
    final              steps at the end in which no more are taken away (tfinal)
    interval           values are taken away in every so many steps (deltaT)
    beta1, beta2       of the running means of the importance and its uncertainty
    orthogonality      weight of the loss that keeps rows of A and columns of B at right angles (orth_reg_weight)
    raises             TypeError, ValueError for other values
    source             Zhang et al. 2023 (arXiv:2303.10512), sections 3.1 to 3.3; the divisor as in PEFT 0.21
    """

    init_r: int = 12
    target_r: int = 8
    total_step: int
    alpha: float = 16
    dropout: float = 0.0
    warm_up: int = 0
    final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    peft_type: ClassVar[str] = "ADALORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("init_r", "target_r", "total_step", "interval"):
            require_rank(f"AdaLoRA: {field}", getattr(self, field))
        for field in ("warm_up", "final"):
            require_int(f"AdaLoRA: {field}", getattr(self, field))
            require_number(f"AdaLoRA: {field}", getattr(self, field), 0)
        require_number("AdaLoRA: alpha", self.alpha, 0)
        require_number("AdaLoRA: dropout", self.dropout, 0, 1)
        require_number("AdaLoRA: orthogonality", self.orthogonality, 0)
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            require_number(f"AdaLoRA: {field}", value, 0, 1)
            if value == 0:
                raise ValueError(f"AdaLoRA: {field} must be above 0")
        if self.target_r >= self.init_r:
            raise ValueError(
                f"AdaLoRA: target_r must be below init_r, {self.init_r}, got {self.target_r}; with equal ranks nothing "
                "is taken away, and octavo.LoRA does the same"
            )
        if self.warm_up + self.final >= self.total_step:
            raise ValueError(
                f"AdaLoRA: of total_step = {self.total_step} steps, warm_up = {self.warm_up} and final = {self.final} "
                "leave none in which values could be taken away; train longer, or make these two smaller"
            )

    @property
    def scaling(self) -> float:
        return (self.alpha or self.init_r) / (self.init_r + DIVISOR_OFFSET)

    def layer(self, name: str, base: nn.Module) -> AdaLoRALayer:
        n, k = sizes_of(base)
        layer = AdaLoRALayer(n, k, self.init_r, self.scaling, self.dropout)
        with torch.no_grad():
            for parameter in (layer.A, layer.B):
                parameter.normal_(mean=0.0, std=0.02)
        return layer

    # --- files of PEFT ----------------------------------------------------------------------------------------------

    def to_peft(self, layers: Mapping[str, Any]) -> dict[str, Any]:
        kept = {f"{name}.lora_E": layer.kept.tolist() for name, layer in layers.items()}
        is_pruned = any(layer.is_pruned for layer in layers.values())
        return {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "total_step": self.total_step,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "tinit": self.warm_up,
            "tfinal": self.final,
            "deltaT": self.interval,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            "rank_pattern": kept if is_pruned else None,
            "bias": "none",
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> AdaLoRA:
        refuse_fields(fields, (*UNSERVED, "use_dora", "use_rslora", "lora_bias"))
        if fields.get("bias", "none") != "none":
            raise ValueError(f"bias is {fields['bias']!r}, of AdaLoRA only 'none' is read")
        return cls(
            init_r=fields["init_r"],
            target_r=fields["target_r"],
            total_step=fields["total_step"],
            alpha=fields.get("lora_alpha", 8),
            dropout=fields.get("lora_dropout", 0.0),
            targets=list(layers),
            warm_up=fields.get("tinit", 0),
            final=fields.get("tfinal", 0),
            interval=fields.get("deltaT", 1),
            beta1=fields.get("beta1", 0.85),
            beta2=fields.get("beta2", 0.85),
            orthogonality=fields.get("orth_reg_weight", 0.5),
        )

    @classmethod
    def peft_tensors(
        cls, fields: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Values that were taken away come back as zeros, so that the layer has the form that it was trained in."""
        pattern = fields.get("rank_pattern") or {}
        return {
            name: _with_zeros(name, tensors, pattern.get(f"{name}.lora_E"))
            for name, tensors in layers.items()
        }


class AdaLoRALayer(LayerAdapter):
    """A [init_r, k], E [init_r, 1] and B [n, init_r], float32.

    kept   bool [init_r], a buffer: which values the last decision has kept. The others are 0 then, but an optimizer
           may move them until the end of the training; files have the kept ones only
    """

    file_names: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    kept: torch.Tensor

    def __init__(self, n: int, k: int, r: int, scaling: float, dropout: float):
        super().__init__()
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.A = nn.Parameter(torch.zeros(r, k, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(n, r, dtype=torch.float32))
        self.E = nn.Parameter(torch.zeros(r, 1, dtype=torch.float32))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool))

    def summary(self) -> str:
        return f"AdaLoRA {int(self.kept.sum())} of {len(self.kept)} values"

    @property
    def is_pruned(self) -> bool:
        return not bool(self.kept.all())

    def keep_(self, kept: torch.Tensor) -> None:
        """Values outside of `kept` bool [init_r] become 0."""
        with torch.no_grad():
            self.kept.copy_(kept)
            self.E.masked_fill_(~kept[:, None], 0.0)

    def after(self, x: torch.Tensor, y: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        seen = self.dropout(x.to(self.A.dtype))
        product = F.linear(F.linear(seen, self.A * self.E), self.B) * (strength * self.scaling)
        return (y + product).to(y.dtype)

    def merged(self, weight: torch.Tensor, strength: float, base: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return weight + strength * self.scaling * (self.B @ (self.A * self.E))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The kept values, if some were taken away."""
        rows = self.kept if self.is_pruned else slice(None)
        return {
            "lora_A": self.A.detach()[rows],
            "lora_B": self.B.detach()[:, rows],
            "lora_E": self.E.detach()[rows],
        }

    def fill_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().fill_(tensors)
        if KEPT in tensors:
            self.kept.copy_(tensors[KEPT])


def _with_zeros(name: str, tensors: Mapping[str, torch.Tensor], kept: Any) -> dict[str, torch.Tensor]:
    if kept is None:
        return dict(tensors)
    mask = torch.tensor(kept, dtype=torch.bool)
    result: dict[str, torch.Tensor] = {KEPT: mask}
    for each, tensor in tensors.items():
        rows = tensor.T if each == "lora_B" else tensor
        if len(rows) != int(mask.sum()):
            raise ValueError(
                f"rank_pattern keeps {int(mask.sum())} values of {name!r}, and {each} has {len(rows)}; the "
                "folder holds files of two adapters"
            )
        whole = rows.new_zeros(len(mask), rows.shape[1])
        whole[mask] = rows
        result[each] = whole.T if each == "lora_B" else whole
    return result
