# SPDX-License-Identifier: Apache-2.0
"""Linear layers that read the same x, computed by one call: it quantizes x once, and saves calls where x is one row.

Their packed weights lie side by side in one buffer, of which each layer's own `packed` is a view. So nothing is held
twice, and each layer is what it was for everybody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from . import packed_memory
from .linear import QuantLinear, frozen

STRIP = 16  # columns of a strip of packed weights: layers of another width would have a gap between them
Joined = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None
]  # packed, column_sum, weight_scale, bias


class SharedInput:
    """[layer(x) for layer in layers], by one product if all are plain QuantLinears of one scheme, and of widths that
    are multiples of 16.

    Not a module: whoever uses it holds the layers. They are joined on first use, and anew after something was loaded
    into one of them.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers: tuple[Any, ...] = tuple(layers)
        self._joined: Joined | None = None
        self._parts: list[Any] = []  # what must be the same objects as before for _joined to be valid

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x [..., k] to one [..., n] for each layer: column slices of one tensor, if the layers are joined."""
        joined = None if torch.compiler.is_compiling() else self._join()
        first = self.layers[0]
        if joined is None or x.shape[-1:] != (first.in_features,):  # the layers say what is wrong with x
            return [layer(x) for layer in self.layers]
        return first.scheme.linear(x, *joined).split([layer.out_features for layer in self.layers], -1)

    def of(self, layers: Sequence[nn.Module]) -> SharedInput:
        """Itself, if these are its layers; a new one for others, which somebody has put into their place."""
        is_same = len(layers) == len(self.layers) and all(map(is_, layers, self.layers))
        return self if is_same else SharedInput(layers)

    @property
    def is_joined(self) -> bool:
        """Whether the next call reads x once for all layers."""
        return self._join() is not None

    def forget(self) -> None:
        """Lets go of the joined tensors, so that layers that are about to be filled anew do not keep two weights."""
        self._joined, self._parts = None, []

    def _join(self) -> Joined | None:
        parts = [part for layer in self.layers for part in _parts(layer)]
        if len(parts) != len(self._parts) or not all(map(is_, parts, self._parts)):
            self._joined = side_by_side(self.layers) if can_be_joined(self.layers) else None
            self._parts = [part for layer in self.layers for part in _parts(layer)]
        return self._joined


def _parts(layer: Any) -> Sequence[Any]:
    if type(layer) is not QuantLinear:
        return (layer,)
    parameters: dict[str, Any] = layer._parameters
    is_watched = bool(layer._forward_hooks or layer._forward_pre_hooks)
    bias = parameters["bias"]
    return (
        layer._buffers["packed"],
        parameters["weight_scale"],
        bias,
        None if bias is None else bias.dtype,  # .to(dtype) changes what the same Parameter holds
        layer.activation,
        is_watched,
    )


def can_be_joined(layers: Sequence[Any]) -> bool:
    first = layers[0]
    return all(
        type(layer) is QuantLinear
        and layer.scheme == first.scheme
        and layer.in_features == first.in_features
        and layer.out_features % STRIP == 0
        and (layer.bias is None) == (first.bias is None)
        and (layer.bias is None or layer.bias.dtype == first.bias.dtype)
        and layer.activation is None
        and not layer.weight_scale.is_meta
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )


def side_by_side(layers: Sequence[QuantLinear]) -> Joined:
    """One tensor of each kind over those of all layers, which become views of it.

    Layers that were packed one after another lie that way already; of others the peak is one more copy of all.
    """
    with torch.inference_mode(False), torch.no_grad():
        packed = [layer.pack_().packed for layer in layers]
        together = packed_memory.joined(packed)
        if together is None:
            together = packed_memory.empty((sum(map(len, packed)), *packed[0].shape[1:]))
            torch.cat(packed, out=together)
        column_sum = torch.cat([layer.column_sum for layer in layers])
        weight_scale = torch.cat([layer.weight_scale.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        strip = row = 0
        for layer in layers:
            strips, rows = slice(strip, strip + len(layer.packed)), slice(row, row + layer.out_features)
            layer.packed, layer.column_sum = together[strips], column_sum[rows]
            layer.weight_scale = frozen(weight_scale[rows])
            if bias is not None:
                layer.bias = frozen(bias[rows])
            strip, row = strips.stop, rows.stop
    return together, column_sum, weight_scale, bias
