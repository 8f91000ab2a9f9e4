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

from ...runtime import huge_pages
from ..layer_state import frozen
from ..linear import QuantLinear

# The operands of the weight format's product, and the bias.
Joined = tuple[tuple[Any, ...], torch.Tensor | None]


class SharedInput:
    """[layer(x) for layer in layers], by one product if all are plain QuantLinears of one scheme, and of widths that
    fill whole strips of their weight format.

    Not a module: whoever uses it holds the layers. They are joined on first use, and anew after something was loaded
    into one of them.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers: tuple[Any, ...] = tuple(layers)
        self._joined: Joined | None = None
        self._seen: list[tuple] = []  # what the layers held when _joined was made

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x [..., k] to one [..., n] for each layer: column slices of one tensor, if the layers are joined."""
        joined = None if torch.compiler.is_compiling() else self.joined()
        first = self.layers[0]
        if joined is None or x.shape[-1:] != (first.in_features,):  # the layers say what is wrong with x
            return [layer(x) for layer in self.layers]
        widths = [layer.out_features for layer in self.layers]
        operands, bias = joined
        scheme = first.scheme
        product: Any = scheme.weights.kernel(scheme.activations)
        return product(x, operands, bias).split_with_sizes(widths, -1)

    def of(self, layers: Sequence[nn.Module]) -> SharedInput:
        """Returns itself, which from now on is for `layers`: some may have been replaced by others."""
        if len(layers) != len(self.layers) or not all(map(is_, layers, self.layers)):
            self.layers = tuple(layers)
            self.forget()
        return self

    @property
    def is_joined(self) -> bool:
        """Whether the next call reads x once for all layers."""
        return self.joined() is not None

    def joined(self) -> Joined | None:
        """The layers' tensors side by side, as they are now; None if the layers cannot be joined."""
        if self._joined is None or not self._is_current():
            self._joined = side_by_side(self.layers) if can_be_joined(self.layers) else None
            self._seen = [] if self._joined is None else list(map(_held_by, self.layers))
        return self._joined

    def forget(self) -> None:
        """Lets go of the joined tensors, so that layers that are about to be filled anew do not keep two weights."""
        self._joined, self._seen = None, []

    def _is_current(self) -> bool:
        """Whether the layers hold what was joined, and are still plain products. Asked at every call."""
        for layer, (packed, parameters, bias, bias_dtype) in zip(self.layers, self._seen, strict=True):
            buffers, own = layer._buffers, layer._parameters
            for name, tensor in packed:
                if buffers[name] is not tensor:
                    return False
            for name, tensor in parameters:
                if own[name] is not tensor:
                    return False
            if (
                own["bias"] is not bias
                or (bias is not None and bias.dtype is not bias_dtype)
                or layer.activation is not None
                or layer._forward_hooks
                or layer._forward_pre_hooks
            ):
                return False
        return True


def _held_by(layer: QuantLinear) -> tuple:
    bias, names = layer.bias, layer.scheme.weights.operands
    dtype = None if bias is None else bias.dtype  # .to(dtype) changes what the same Parameter holds
    held: tuple[list, ...] = tuple(
        [(name, tensors[name]) for name in names if name in tensors]
        for tensors in (layer._buffers, layer._parameters)
    )
    return *held, bias, dtype


def can_be_joined(layers: Sequence[Any]) -> bool:
    first = layers[0]
    return all(
        type(layer) is QuantLinear
        and layer.scheme.weights.kernel(layer.scheme.activations) is not None
        and not layer.input_names
        and layer.scheme == first.scheme
        and layer.in_features == first.in_features
        and layer.out_features % layer.scheme.weights.strip == 0
        and (layer.bias is None) == (first.bias is None)
        and (layer.bias is None or layer.bias.dtype == first.bias.dtype)
        and layer.activation is None
        and not any(parameter.is_meta for parameter in layer.parameters())
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )


def side_by_side(layers: Sequence[QuantLinear]) -> Joined:
    """One tensor of each kind over the tensors of all layers, which become views of it.

    Layers that were packed one after another lie that way already; of others the peak is one more copy of all.
    """
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            layer.pack_()
        weights = layers[0].scheme.weights
        operands = weights.joined_operands(*(_as_one(layers, name) for name in weights.operands))
        bias = None if layers[0].bias is None else _as_one(layers, "bias")
    return operands, bias


def _as_one(layers: Sequence[QuantLinear], name: str) -> Any:
    """One tensor over the tensors `name` of all layers, which become views of it; the sum of numbers; None of None."""
    own: list[Any] = [getattr(layer, name) for layer in layers]
    if not isinstance(own[0], torch.Tensor):
        return None if own[0] is None else sum(own)
    parts = [
        layer.scheme.weights.joinable(name, tensor.detach(), layer.out_features)
        for layer, tensor in zip(layers, own, strict=True)
    ]
    together = _whole_of(parts)
    if together is None:  # else another user has joined them, who would have to follow
        together = _joined(parts)
        for layer, part in zip(layers, together.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, frozen(part) if name in layer._parameters else part)
    return together


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts one behind another: their own memory if they lie like that on huge pages, else a copy."""
    if parts[0].dim() < 4:  # these are no codes, but small tensors
        return torch.cat(parts)
    codes = [part.view(torch.int8) for part in parts]
    together = huge_pages.joined(codes)
    if together is None:
        together = huge_pages.empty((sum(map(len, codes)), *codes[0].shape[1:]))
        torch.cat(codes, out=together)
    return together.view(parts[0].dtype)


def _whole_of(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that `parts` are slices of, from the first to the last, one behind the other; else None."""
    first = parts[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        is_next = part.untyped_storage().data_ptr() == storage and part.storage_offset() == end
        if not (is_next and part.is_contiguous() and part.dtype == first.dtype):
            return None
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
