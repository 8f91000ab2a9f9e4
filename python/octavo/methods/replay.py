# SPDX-License-Identifier: Apache-2.0
"""Calls of a model that are kept while it is watched, to be made again: does it still give what it gave?

This is how readers are found that cannot be watched: scripted and compiled functions, other threads, operators that
take an address. Factors that are powers of two go through float arithmetic without rounding, so a model in which
they cancel gives the same numbers again, and bits tell (docs/numerics.md, eq. 58).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.batches import float_tensors
from ..base.hooks import hooked
from ..nn import QuantLinear

MOST_CALLS = 2  # each costs a run of the model: the first one, and the first with other shapes or arguments
MOST_ELEMENTS, FEW_ELEMENTS = 2**20, 2**12  # of each output are kept, evenly spaced; of modules inside


@dataclass
class _RecordedCall:
    """One call of the outermost module; samples of what it gave, and of what modules inside gave, in their order."""

    module: nn.Module
    args: tuple
    kwargs: dict
    random_state: torch.Tensor
    autocast: torch.dtype | None
    outputs: list[torch.Tensor] = field(default_factory=list)
    inside: list[torch.Tensor] = field(default_factory=list)
    modules: set[nn.Module] = field(default_factory=set)  # those inside

    def run(self) -> list[torch.Tensor]:
        """Makes the call again with the same random numbers, and puts back what it changes in the module's state."""
        args, kwargs = _copied((self.args, self.kwargs))  # caches grow while they are used
        with torch.random.fork_rng(devices=[]), _state_kept(self.module), torch.no_grad():
            torch.set_rng_state(self.random_state)
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                inside: list[torch.Tensor] = []

                def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                    inside.extend(_samples(output, FEW_ELEMENTS))

                with hooked((module, note) for module in self.modules):
                    return [*_samples(self.module(*args, **kwargs), MOST_ELEMENTS), *inside]


class Replay:
    """The first calls of a watched model."""

    def __init__(self) -> None:
        self.calls: list[_RecordedCall] = []
        self.is_lost = False  # a call could not be kept
        self._seen: set[Any] = set()
        self._open: _RecordedCall | None = None

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Is told that the outermost module is called."""
        self._open = None
        signature = (id(module), _signature((args, kwargs)))
        if len(self.calls) >= MOST_CALLS or signature in self._seen:
            return
        self._seen.add(signature)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        try:
            with torch.inference_mode(False), torch.no_grad():
                args, kwargs = _copied((args, kwargs))
        except Exception:  # what it is given cannot be copied
            self.is_lost = True
            return
        self._open = _RecordedCall(module, args, kwargs, torch.get_rng_state(), autocast)

    def add(self, module: nn.Module, output: Any) -> None:
        """Is told that a module inside, which is a model by itself, gives `output`: this must stay the same, too."""
        if self._open is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._open.inside += _samples(output, FEW_ELEMENTS)
            self._open.modules.add(module)

    def end(self, output: Any) -> None:
        """Is told that the outermost module gives `output`."""
        if self._open is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._open.outputs = _samples(output, MOST_ELEMENTS)
            self.calls.append(self._open)
            self._open = None

    def agrees(self, tolerance: float) -> bool:
        """Whether the calls give again what they gave, but for `tolerance` times the largest element of each output.

        False, too, if nothing that could be compared was kept, or if a call raises an error.
        """
        if self.is_lost or not all(call.outputs for call in self.calls):
            return False
        try:
            return bool(self.calls) and all(
                _same([*call.outputs, *call.inside], call.run(), tolerance) for call in self.calls
            )
        except Exception:
            return False


def _samples(output: Any, most: int) -> list[torch.Tensor]:
    samples = []
    for tensor in float_tensors(output):
        step = -(-tensor.numel() // most)
        samples.append(tensor.detach().flatten()[:: max(step, 1)].clone())
    return samples


def _same(expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float) -> bool:
    if [x.shape for x in expected] != [x.shape for x in found]:
        return False
    return all(_close(a, b, tolerance) for a, b in zip(expected, found, strict=True))


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if torch.equal(a, b):
        return True
    a, b = a.double(), b.double()
    is_finite = a.isfinite()
    largest = torch.where(is_finite, a.abs(), 0.0).max()
    # NaN and Inf must be where they were.
    is_close = torch.where(
        is_finite, (a - b).abs() <= tolerance * largest, (a == b) | (a.isnan() & b.isnan())
    )
    return bool(is_close.all())


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, nn.Module) or callable(value):
        return value
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _signature(value: Any) -> Any:
    """A hashable value that is equal for arguments with the same shapes, dtypes and flags."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((str(key), _signature(item)) for key, item in value.items())
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Sequence):
        return tuple(map(_signature, value))
    return type(value).__name__


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Puts back attributes, lists and buffers of `model` afterwards, as if observers had seen nothing."""
    references = [
        (entries, dict(entries))
        for module in model.modules()
        for entries in (module.__dict__, module._parameters, module._buffers, module._modules)
    ]
    lists = [(v, list(v)) for module in model.modules() for v in vars(module).values() if type(v) is list]
    buffers = [
        (buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        if not isinstance(module, QuantLinear)  # packed codes do not change
        for buffer in module._buffers.values()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for entries, before in references:
            entries.clear()
            entries.update(before)
        for items, content in lists:
            items[:] = content
        for buffer, value, version in buffers:
            if buffer._version != version:
                buffer.copy_(value)
