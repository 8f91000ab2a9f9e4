# SPDX-License-Identifier: Apache-2.0
"""Forward hooks for as long as a model is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]],
    *,
    before: bool = False,
    first: bool = False,
    always: bool = False,
) -> Iterator[None]:
    """Inside, each hook sees the calls of its module; afterwards, also after an error, the hooks are gone.

    hooks    (module, hook): hook(module, args, kwargs, output)
    before   the hooks run before the module does: hook(module, args, kwargs)
    first    the hooks run before all hooks that the module has already
    always   hooks that run after the module run, too, if it raises an error; their output is then None
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            if before:
                handle = module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
            else:
                handle = module.register_forward_hook(
                    hook, prepend=first, with_kwargs=True, always_call=always
                )
            stack.callback(handle.remove)
        yield
