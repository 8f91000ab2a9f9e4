# SPDX-License-Identifier: Apache-2.0
"""Modules that call F.scaled_dot_product_attention themselves: inside their forward, octavo answers that call.

Nothing is patched: a TorchFunctionMode is on while such a module runs, and off everywhere else. It costs about 1 us for
each torch function in there, so this is done only when asked for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ... import ops
from ...base.hooks import hooked
from ...conversion.plan import has_hooks
from ..example import Example
from ..step import MODULE_HAS_HOOKS, Candidate, Changes, own_forward
from .interface import NO_DROPOUT, is_native


class PlainAttention:
    """Gives modules whose own forward calls F.scaled_dot_product_attention a forward in which octavo computes it."""

    name = "plain attention"

    def __init__(self, precision: str):
        self.precision = precision

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        found = _callers(model, example)
        names = {module: name for name, module in model.named_modules()}
        if not found:
            reason = "no module calls F.scaled_dot_product_attention"
            return [Candidate("", type(model).__name__, reason)]
        return [self._candidate(names[module], module) for module in found]

    def _candidate(self, name: str, module: nn.Module) -> Candidate:
        candidate = Candidate(name, type(module).__name__)
        if "forward" in vars(module):
            candidate.reason = own_forward(module)
        elif has_hooks(module):
            candidate.reason = MODULE_HAS_HOOKS
        else:
            forward = partial(forward_with_ours, module, self.precision)
            candidate.reads = candidate.gives = module
            candidate.compute = forward
            candidate.apply = partial(Changes.set, owner=module, name="forward", value=forward)
        return candidate


def forward_with_ours(module: nn.Module, precision: str, *args: Any, **kwargs: Any) -> Any:
    """The module's forward, in which F.scaled_dot_product_attention is octavo.ops.attention."""
    with _Ours(precision):
        return type(module).forward(module, *args, **kwargs)


class _Ours(TorchFunctionMode):
    def __init__(self, precision: str):
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(self.precision, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    precision: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """F.scaled_dot_product_attention, computed by octavo where it can, else by torch."""
    if dropout_p:
        raise ValueError(NO_DROPOUT)
    is_4d = query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0]
    # torch's causal mask begins at the first key, ours ends at the last one.
    fits = not is_causal or query.shape[-2] == key.shape[-2]
    if not is_4d or not fits or not is_native(query, key, value, {}):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    batch, heads, length, size = query.shape
    y = ops.attention(
        query, key, value, attn_mask, causal=is_causal, scale=options.get("scale"), precision=precision
    )
    return y.view(batch, length, heads, size).transpose(1, 2)


# --- finding --------------------------------------------------------------------------------------------------------


def _callers(model: nn.Module, example: Example) -> list[nn.Module]:
    """The modules in whose own forward F.scaled_dot_product_attention is called, and not in a child's."""
    running: list[nn.Module] = []
    found: dict[nn.Module, None] = {}

    class Watcher(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            if func is F.scaled_dot_product_attention and running:
                found[running[-1]] = None
            return func(*args, **(kwargs or {}))

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        running.append(module)

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running.pop()

    modules = list(model.modules())
    with (
        hooked(((module, enter) for module in modules), before=True),
        hooked(((module, leave) for module in modules), always=True),
        Watcher(),
    ):
        example.run()
    return list(found)
