# SPDX-License-Identifier: Apache-2.0
"""The hooks by which transformers collects hidden states and attention weights.

transformers hangs them on all modules of a model when a call first asks for one of the two, and never again. They say
nothing about the modules, so they are no reason to keep one; and modules that stood elsewhere at that time have none.
They do something in those calls only that ask: a variable of transformers holds what such a call collects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"
_INSTALLED = "_output_capturing_hooks_installed"


def forget_capturing(model: nn.Module) -> None:
    """Removes these hooks from `model`, in place: transformers hangs them anew when a call needs them."""
    for module in model.modules():
        vars(module).pop(_INSTALLED, None)
        for key, hook in list(module._forward_hooks.items()):
            if _is_capturing(hook):
                del module._forward_hooks[key]


def collected() -> Mapping[str, Any]:
    """What the call that runs now collects, by the names that outputs have; empty if it collects nothing."""
    capturing = sys.modules.get(_MODULE)  # absent from older versions
    return {} if capturing is None else capturing._active_collector.get() or {}


def are_idle(hooks: Iterable[Mapping[int, Any]]) -> bool:
    """Whether all of `hooks` are transformers', and the call that runs now collects nothing."""
    return not collected() and all(_is_capturing(hook) for each in hooks for hook in each.values())


def _is_capturing(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _MODULE
