# SPDX-License-Identifier: Apache-2.0
"""Layers that share one weight: an embedding reads rows of it, the head that is tied to it multiplies by it.

Each layer holds the same tensors by reference, packed or not, so copies, pickles and files find them shared as they
find any other tensor. What remains is done here: whatever gives one layer a new weight gives it to all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch


class SharedWeight:
    """The layers, of one weight format and one shape, that hold the same weight. None of them is kept alive."""

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._unpacked: dict[str, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._packed: weakref.ref[torch.Tensor] | None = None

    def join(self, layer: Any) -> None:
        self._layers.add(layer)
        layer.shared = self

    def give_to_all(self, layer: Any) -> None:
        """Gives the weight of `layer`, which is one of them, to all others: the same tensors."""
        weights = layer.scheme.weights
        names = {*weights.tensors(layer.out_features, layer.in_features), *weights.held}
        for other in self._layers:
            if other is not layer:
                for kind in ("_parameters", "_buffers"):
                    mine, its = getattr(layer, kind), getattr(other, kind)
                    for name in names:
                        its.pop(name, None)
                    its.update((name, mine[name]) for name in names if name in mine)

    def state_of(self, layer: Any, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `make` unpacks of `layer`: in one state_dict the same tensors for all layers, so that files have them
        once. Nobody keeps them here, and nobody is given what was written to."""
        packed = layer._buffers[layer.scheme.weights.held[0]]
        if self._packed is not None and self._packed() is packed:
            found = {name: reference() for name, (reference, _) in self._unpacked.items()}
            versions = [version for _, version in self._unpacked.values()]
            if versions == [None if tensor is None else _version(tensor) for tensor in found.values()]:
                return found  # type: ignore[return-value]
        made = make()
        self._packed = weakref.ref(packed)
        self._unpacked = {name: (weakref.ref(tensor), _version(tensor)) for name, tensor in made.items()}
        return made

    # A copy, by deepcopy or by pickle, begins empty: each copied layer joins it when it is made.

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _version(tensor: torch.Tensor) -> int:
    """A number that changes when the tensor is written to; inference tensors have none, and are not looked after."""
    return -1 if tensor.is_inference() else tensor._version


def share_equal_(layers: Iterable[Any]) -> None:
    """Makes those of `layers` share their weight whose codes are one Parameter, as a tied model's are after loading."""
    groups: dict[int, list[Any]] = {}
    for layer in layers:
        codes = layer._parameters.get(layer.scheme.weights.replaced[0])
        if codes is not None:
            group = groups.setdefault(id(codes), [])
            if all(layer is not other for other in group):
                group.append(layer)
    for group in groups.values():
        if len(group) > 1 and len({layer.scheme.weights for layer in group}) == 1:
            shared = SharedWeight()
            for layer in group:
                shared.join(layer)
