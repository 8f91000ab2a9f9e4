# SPDX-License-Identifier: Apache-2.0
"""GatedMLP: down(silu(gate(x)) * up(x)) with few operators, as Llama and its kin have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ... import ops
from .shared_input import SharedInput


class GatedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)).

    gate_proj, up_proj, down_proj   any linear layers, held as they are: names in the state_dict stay. The first two
                                    read x by one call where SharedInput can join them
    source   gated units: Shazeer 2020 (arXiv:2002.05202)
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self._shared = SharedInput((gate_proj, up_proj))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] to [..., k] in its dtype."""
        return self.down_proj(self.hidden(x))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What down_proj reads, [..., n]."""
        modules: dict[str, Any] = self._modules
        gate, up = self._shared.of((modules["gate_proj"], modules["up_proj"]))(x)
        return ops.silu_mul(gate, up)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._shared.forget()
        super()._load_from_state_dict(*args)
