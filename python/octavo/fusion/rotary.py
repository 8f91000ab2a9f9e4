# SPDX-License-Identifier: Apache-2.0
"""Attention modules with rotary embeddings -> octavo.nn.RotaryAttention: one product for queries, keys and values, one
operator for the rotation. Found by the names of their parts, believed only after the example has shown equal results.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn import QuantLinear, RotaryAttention
from ..nn.rotary_attention import NORMS, PROJECTIONS
from ..plan import has_hooks
from .example import Example
from .interface import NAMES, attention_forward
from .step import HOOKS, Candidate, Changes

CHILDREN = {*PROJECTIONS, "o_proj"}
ATTRIBUTES = ("head_dim", "layer_idx", "scaling", "config")


class Rotary:
    """Attention modules that take `position_embeddings` -> RotaryAttention. Comes after the step "attention"."""

    name = "rotary"

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        found = [(name, module) for name, module in model.named_modules() if takes_rotations(module)]
        return [self._candidate(model, name, module) for name, module in found]

    def _candidate(self, model: nn.Module, name: str, module: Any) -> Candidate:
        candidate = Candidate(name, type(module).__name__, obstacle(module))
        if not candidate.reason:
            precision = next(
                key for key, value in NAMES.items() if value == module.config._attn_implementation
            )
            candidate.reads, candidate.gives, candidate.of_input = module, module.o_proj, True
            candidate.bound = partial(_bound, precision)
            replacement = RotaryAttention(module, partial(attention_forward, precision=precision))
            candidate.compute = partial(_compute, replacement)
            candidate.apply = partial(Changes.replace, model=model, old=module, new=replacement)
        return candidate


def takes_rotations(module: nn.Module) -> bool:
    """Whether it looks like an attention module that rotates queries and keys itself."""
    if not all(hasattr(module, name) for name in PROJECTIONS) or isinstance(module, RotaryAttention):
        return False
    return "position_embeddings" in inspect.signature(module.forward).parameters


def obstacle(module: Any) -> str:
    """Why RotaryAttention cannot stand for it; "" if it may."""
    children = {name for name, _ in module.named_children()}
    if children not in (CHILDREN, CHILDREN | set(NORMS)):
        return f"its parts are {', '.join(sorted(children))}, known are {', '.join(sorted(CHILDREN))}"
    missing = [name for name in ATTRIBUTES if not hasattr(module, name)]
    if missing:
        return f"it has no attribute {missing[0]}"
    if not all(isinstance(getattr(module, name), nn.Linear | QuantLinear) for name in CHILDREN):
        return "its projections are not linear layers"
    if getattr(module, "sliding_window", None) is not None:
        return "it looks through a sliding window"
    if module.config._attn_implementation not in NAMES.values():
        return "its model does not use octavo's attention"
    return HOOKS if has_hooks(module) else ""


def _compute(replacement: RotaryAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Beside the original, which writes into the cache itself. Behind o_proj a rounding could move an int8 code."""
    kwargs["past_key_values"] = copy.deepcopy(kwargs.get("past_key_values"))
    return replacement.attended(*args, **kwargs)[0]


def _bound(precision: str, expected: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Wide: it is for another formula, not for rounding. Rounding q and k to bfloat16 moves scores of 16 by 1/8."""
    return (2**-10 if precision == "float32" else 2**-3) * expected.abs().max()
