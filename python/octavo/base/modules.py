# SPDX-License-Identifier: Apache-2.0
"""Modules change places by reference, so putting the references back undoes whatever was done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Places = dict[int, list[tuple[nn.Module, str]]]


def places_of(modules: Iterable[nn.Module], model: nn.Module) -> Places:
    """Where each of `modules` hangs in `model`: {id of the module: [(parent, attribute), ...]}."""
    places: Places = {id(module): [] for module in modules}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in places:
                places[id(child)].append((parent, attribute))
    return places


def replace_at(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Hangs `module` at these places."""
    for parent, attribute in places:
        parent._modules[attribute] = module


class Undo:
    """Remembers the attributes, parameters, buffers and children of every module. It holds tensors, no copies of them.

    Vectors (the Parameters of norms, biases, scales) also get back the values that they had. Matrices that were
    changed in place stay changed: there is no room for copies of them.
    """

    def __init__(self, model: nn.Module):
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (references, dict(references))
            for module in model.modules()
            for references in (module.__dict__, module._parameters, module._buffers, module._modules)
        ]
        self._vectors = [(p, p.detach().clone(), p._version) for p in model.parameters() if _is_vector(p)]

    @property
    def is_possible(self) -> bool:
        return bool(self._before)

    def let_go(self) -> None:
        """Forgets everything, so that float weights can be freed; from now on `undo` does nothing."""
        self._before, self._vectors = [], []

    def undo(self) -> None:
        try:
            for references, entries in self._before:
                references.clear()
                references.update(entries)
            with torch.no_grad():
                for parameter, value, version in self._vectors:
                    if parameter._version != version:
                        parameter.copy_(value)
        except KeyboardInterrupt:  # another one, while the first is answered
            self.undo()


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[Undo]:
    """After an exception, puts `model` back as far as `Undo` can. Gives the Undo, whose `let_go` gives that up."""
    undo = Undo(model)
    try:
        yield undo
    except BaseException:
        undo.undo()
        raise


def _is_vector(parameter: torch.Tensor) -> bool:
    if is_lazy(parameter) or parameter.is_meta or parameter.is_inference():
        return False
    return parameter.numel() == max(parameter.shape, default=1)
