# SPDX-License-Identifier: Apache-2.0
"""Who else has the memory of a Parameter: other modules of the model, other models, views that somebody keeps.

A Parameter is changed in place, so that an optimizer goes on training it. Everybody else who reads the same memory
would see the change, too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Span = tuple[int, int]  # the addresses of a tensor's first byte and of the one behind its last


def span_of(tensor: torch.Tensor) -> Span | None:
    """The span of a tensor; None if its memory cannot be compared: lazy, meta, sparse, empty, on another device."""
    if is_lazy(tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    if tensor.numel() == 0:
        return None
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def sole_owners(model: nn.Module) -> set[nn.Module]:
    """The modules whose Parameters share no memory with any other Parameter or buffer of `model`."""
    spans: list[tuple[Span, nn.Module, int]] = []
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                span = _span_or_none(tensor)
                spans.append((span or (-id(tensor), -id(tensor) + 1), module, id(tensor)))
    spans.sort(key=lambda entry: entry[0])
    shared: set[nn.Module] = set()
    end, last = 0, None
    for (start, stop), module, _ in spans:
        if last is not None and start < end:
            shared |= {module, last}
        if last is None or stop > end or start >= end:
            end, last = stop, module
    return set(model.modules()) - shared


class Holders:
    """The modules and tensors outside of `model` that live in this process, as far as Python knows them.

    is_layer   tells modules that are replaced by other layers. Such a module that is nobody's child was taken out of
               a model: it does not count as a holder
    """

    def __init__(self, model: nn.Module, is_layer: Callable[[nn.Module], bool] = lambda module: False):
        self.model, self.is_layer = model, is_layer
        self._look()

    def _look(self) -> None:
        own = {id(module) for module in self.model.modules()}
        inside = {id(tensor) for module in self.model.modules() for tensor in _tensors_of(module)}
        module_kinds, tensor_kinds = _kinds(nn.Module), _kinds(torch.Tensor)
        kinds = module_kinds | tensor_kinds
        found = [
            item for item in gc.get_objects() if type(item) in kinds
        ]  # there are some 10^6 objects: one lookup for each is quick
        modules: list[Any] = [m for m in found if type(m) in module_kinds and id(m) not in own]
        tensors = [t for t in found if type(t) in tensor_kinds and id(t) not in inside]
        children = {id(child) for module in modules for child in _children_of(module)}
        models = [m for m in modules if id(m) in children or not self.is_layer(m)]
        self.owned = {id(tensor) for module in models for tensor in _tensors_of(module)}
        self.owned_spans = [_span_or_none(tensor) for module in models for tensor in _tensors_of(module)]
        self.spans = [_span_or_none(tensor) for tensor in tensors]
        others = [module for module in models if not any(part is self.model for part in _parts_of(module))]
        entries = [child for module in others for child in _children_of(module) if id(child) in own]
        self.called = {id(part) for entry in entries for part in _parts_of(entry)}

    def have(
        self, module: nn.Module, parameters: Iterable[torch.Tensor | None], *, or_view: bool = True
    ) -> bool:
        """Whether something outside of the model has `module` in it, one of `parameters`, or the memory of one.

        or_view   whether tensors that belong to no module count: a view in a variable, a state_dict that is kept
        """
        present = [p for p in parameters if p is not None]
        if not self._have(module, present, or_view):
            return False
        gc.collect()  # it may be garbage that nobody can reach any more
        self._look()
        return self._have(module, present, or_view)

    def _have(self, module: nn.Module, parameters: list[torch.Tensor], or_view: bool) -> bool:
        if id(module) in self.called or any(id(p) in self.owned for p in parameters):
            return True
        spans = [span for span in map(_span_or_none, parameters) if span is not None]
        return any(map(_overlap, self.owned_spans, repeat(spans))) or (
            or_view and any(map(_overlap, self.spans, repeat(spans)))
        )


def _kinds(base: type) -> set[type]:
    """`base` and all classes that derive from it."""
    subclasses: list[type] = type.__subclasses__(base)
    return {base}.union(*map(_kinds, subclasses))


def _children_of(module: nn.Module) -> list[Any]:
    return [child for child in module.__dict__.get("_modules", {}).values() if child is not None]


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all inside of it. Others' modules may be half made, which their method `modules` cannot take."""
    waiting, seen = [module], {id(module)}
    while waiting:
        part = waiting.pop()
        yield part
        for child in _children_of(part):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _tensors_of(module: nn.Module) -> Iterator[Any]:
    parts = (module.__dict__.get("_parameters"), module.__dict__.get("_buffers"))
    return (tensor for part in parts if part for tensor in part.values() if tensor is not None)


def _span_or_none(tensor: Any) -> Span | None:
    try:
        return span_of(tensor)
    except Exception:  # subclasses of Tensor need not have an address
        return None


def _overlap(span: Span | None, spans: list[Span]) -> bool:
    return span is not None and any(span[0] < end and start < span[1] for start, end in spans)
