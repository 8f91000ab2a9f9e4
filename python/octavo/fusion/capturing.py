# SPDX-License-Identifier: Apache-2.0
"""The hooks by which transformers collects hidden states and attention weights.

transformers hangs them on all modules of a model when a call first asks for one of the two, and never again. They say
nothing about the modules, so they are no reason to keep one; and modules that stood elsewhere at that time have none.
"""

from __future__ import annotations

from torch import nn

_MODULE = "transformers.utils.output_capturing"
_INSTALLED = "_output_capturing_hooks_installed"


def forget_capturing(model: nn.Module) -> None:
    """Removes these hooks from `model`, in place: transformers hangs them anew when a call needs them."""
    for module in model.modules():
        vars(module).pop(_INSTALLED, None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == _MODULE:
                del module._forward_hooks[key]
