# SPDX-License-Identifier: Apache-2.0
"""Gated feed-forward modules of the Llama kind, by the names of their layers, replaced by octavo.nn.GatedMLP.

The layers stay the objects they are, under their names. What is compared is what the last layer reads: behind it, a
difference of one rounding may move an int8 code, and the error would be that of the quantization.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...conversion.plan import has_hooks
from ...nn import GatedMLP
from ..example import Example
from ..paths import Proofs, other_paths
from ..step import MODULE_HAS_HOOKS, Candidate, Changes, ModuleStep
from ..verify import FLOAT32_ERROR
from .activations import activation_of

SIZES = (1.0, 16.0)  # random inputs of both sizes: the activation is no straight line for either of them
LAYERS = ("gate_proj", "up_proj", "down_proj")


class Gated(ModuleStep):
    """Replaces modules that compute down_proj(silu(gate_proj(x)) * up_proj(x)) by GatedMLP."""

    name = "gated"

    def concerns(self, module: nn.Module) -> bool:
        return set(LAYERS) <= set(module._modules) and not isinstance(module, GatedMLP)

    def look_at(self, candidate: Candidate, module: nn.Module, example: Example) -> None:
        candidate.reason = _obstacle(module, example.proofs)
        if candidate.reason:
            return
        layers: list[Any] = [module.get_submodule(layer) for layer in LAYERS]
        gate, up, down = layers
        replacement = GatedMLP(gate, up, down)
        candidate.reads, candidate.gives, candidate.of_input = module, down, True
        candidate.compute, candidate.bound = replacement.hidden, partial(_bound, gate, up)
        candidate.apply = partial(Changes.replace, model=example.model, old=module, new=replacement)
        x = _random(module, gate.in_features)
        candidate.reason = other_paths(module, {"": x}, example.proofs)
        candidate.trials = [(size * x,) for size in SIZES]


def _random(module: nn.Module, width: int) -> torch.Tensor:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def _obstacle(module: nn.Module, proofs: Proofs) -> str:
    others = [child for name, child in module._modules.items() if name not in LAYERS and child is not None]
    if module._parameters or module._buffers or len(others) != 1:
        return "has more than three layers and an activation"
    activation = activation_of(others[0], proofs)
    if activation != "silu":
        return f"its activation is {activation or type(others[0]).__name__}, not silu"
    return MODULE_HAS_HOOKS if has_hooks(module) or has_hooks(others[0]) else ""


def _bound(gate: Any, up: Any, expected: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The error of silu is a share of its result, or of 1 where the result is small; it is multiplied by up(x)."""
    y, factor = expected.float().abs(), up.forward(x).float().abs()
    if expected.dtype == torch.float32:
        return FLOAT32_ERROR * (y + factor)
    return 4 * torch.finfo(expected.dtype).eps * ((gate.forward(x).float().abs() + 1) * factor + y)
