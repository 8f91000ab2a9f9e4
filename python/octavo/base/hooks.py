# SPDX-License-Identifier: Apache-2.0
"""Forward hooks for as long as a model is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False) -> Iterator[None]:
    """Inside, each hook sees the calls of its module; afterwards, also after an error, the hooks are gone.

    hooks    (module, hook): hook(module, args, kwargs, output)
    before   the hooks run before the module does: hook(module, args, kwargs)
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook, with_kwargs=True).remove)
        yield
