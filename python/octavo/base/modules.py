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
    """Where each of `modules` hangs in `model`, by its id: (parent, attribute). Holds none of them."""
    places: Places = {id(module): [] for module in modules}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in places:
                places[id(child)].append((parent, attribute))
    return places


def replace_at(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Hangs `module` there."""
    for parent, attribute in places:
        parent._modules[attribute] = module


class Undo:
    """What every module of a model had: attributes, parameters, buffers, children. Tensors are held, not copied.

    Vectors (the Parameters of norms, biases, scales) get back the values they had as well. Matrices that were changed
    in place stay changed: there is no room for a copy.
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
        """Holds nothing any more, and so undoes nothing any more."""
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
    """After an exception `model` is what it was, as far as `Undo` says. Gives the Undo, to be let go before the end."""
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
