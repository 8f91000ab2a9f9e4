# SPDX-License-Identifier: Apache-2.0
"""Which module's output is the input of which layers, and of nothing else: found by watching a model run on real data.

A module's output is known by the identity of its tensor. Modules' hooks see who calls whom; what is done to a tensor
outside of modules (a residual sum, a slice) passes through a TorchFunctionMode. Whatever is not understood counts as
another use of the tensor, so a group that is found is one in every batch that was run. What can be called or asked for
counts as read, whether it was or not: the output of a module that is a model by itself, a tensor that is kept.
What no mode sees, functions in C++ or in other threads, is left to replay.py.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..base.batches import float_tensors
from ..base.hooks import hooked
from .absorbing import has_global_hooks, has_hooks, is_norm_like, may_absorb
from .replay import Replay

__all__ = ["Group", "Source", "Trace", "is_norm_like", "traced"]

# Functions that read no values; below, functions that may give their argument back as it is.
QUESTIONS = {
    "__get__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "__len__",
}
PASSING_ON = {"dropout", "contiguous", "to", "float"}
MOST_SHAPES = 4  # of the inputs of one producer are kept, for trials

Shapes = tuple[tuple, dict]  # arguments of a call, with tensors on the meta device


@dataclass
class Group:
    """`consumers` read what `producer` gives, in some cases through a ReLU, and nobody else does.

    calls   arguments that the producer was called with, with tensors on the meta device
    """

    producer: nn.Module
    consumers: list[nn.Module]
    through_relu: bool
    calls: list[Shapes] = field(default_factory=list)


@dataclass(eq=False)
class Source:
    """A module that gives tensors, and what became of them."""

    producer: nn.Module
    consumers: dict[nn.Module, bool] = field(default_factory=dict)  # through a ReLU?
    has_other_use: bool = False
    may_be_read: bool = False  # it was not, but somebody can get at it
    calls: dict[object, Shapes] = field(default_factory=dict)  # one for each number of axes


@dataclass
class Trace:
    """What was seen of the model."""

    sources: dict[nn.Module, Source] = field(default_factory=dict)
    inputs: dict[nn.Module, set[Source | None]] = field(default_factory=dict)  # of each layer; None: others
    read_elsewhere: set[nn.Module] = field(default_factory=set)  # modules whose Parameters others read
    is_lost: bool = False  # modules ran in several threads
    replay: Replay = field(default_factory=Replay)

    def groups(self) -> list[Group]:
        """The groups, in the order in which the producers ran. A layer is in one group at most."""
        result = []
        for source in () if self.is_lost else self.sources.values():
            through_relu = set(source.consumers.values())
            fed_by_it_alone = all(self.inputs[consumer] == {source} for consumer in source.consumers)
            is_read = source.has_other_use or source.may_be_read
            is_read = is_read or not self.read_elsewhere.isdisjoint({source.producer, *source.consumers})
            if len(through_relu) == 1 and fed_by_it_alone and not is_read:
                result.append(
                    Group(
                        source.producer,
                        list(source.consumers),
                        through_relu.pop(),
                        self.calls_of(source.producer),
                    )
                )
        return result

    def calls_of(self, module: nn.Module) -> list[Shapes]:
        source = self.sources.get(module)
        return [] if source is None else list(source.calls.values())


@contextmanager
def traced(
    model: nn.Module,
    layers: Sequence[nn.Module],
    is_producer: Callable[[nn.Module], bool] = may_absorb,
) -> Iterator[Trace]:
    """Inside, runs of `model` are watched.

    layers        the modules whose inputs are asked for
    is_producer   says whether the output of a module is followed

    Scripted and compiled modules hide what they do: with one in the model, nothing is found.
    """
    trace = Trace({}, {layer: set() for layer in layers})
    if any(_hides_what_it_does(module) for module in model.modules()):
        yield trace
        return
    watcher, modules = _Watcher(trace, model, is_producer), list(model.modules())
    entering = hooked(((module, watcher.enter) for module in modules), before=True)
    leaving = hooked(((module, watcher.leave) for module in modules), always=True)
    with watcher, entering, leaving:
        yield trace
    watcher.mark_kept()


def _hides_what_it_does(module: nn.Module) -> bool:
    # By name, for importing torch._dynamo takes longer than most calibrations of small models.
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"


class _Watcher(TorchFunctionMode):
    """Sees every torch function, in Python, that is called in this thread while the mode is on."""

    def __init__(self, trace: Trace, model: nn.Module, is_producer: Callable[[nn.Module], bool]):
        super().__init__()
        self.trace = trace
        self.known: Any = WeakTensorKeyDictionary()  # tensor -> (its source, through a ReLU?)
        self.running: list[nn.Module] = []
        self.blind = 0  # inside of a layer, or of a hook
        self.thread = threading.get_ident()
        modules = list(model.modules())
        self.producers = {module for module in modules if is_producer(module)}
        # Hooks of users, who may do anything with what they are shown.
        everywhere = has_global_hooks()
        self.hooked = {module for module in modules if everywhere or has_hooks(module)}
        self.weighted = {m: {part for part in m.modules() if _has_parameters(part)} for m in modules}
        self.owners: dict[int, list[nn.Module]] = {}
        for module in modules:
            for parameter in module._parameters.values():
                self.owners.setdefault(id(parameter), []).append(module)

    # --- modules ----------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() != self.thread:
            self.trace.is_lost = True
            return
        if not self.running:
            with self._blinded():
                self.trace.replay.begin(module, args, kwargs)
        self.running.append(module)
        if module in self.hooked:
            self._mark_shown(module, args, kwargs)
        if module in self.trace.inputs:
            self.blind += 1
            for x in float_tensors((args, kwargs)):
                source, through_relu = self.known.get(x, (None, False))
                self.trace.inputs[module].add(source)
                if source is not None and source.consumers.setdefault(module, through_relu) != through_relu:
                    source.has_other_use = True

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if threading.get_ident() != self.thread or module not in self.running:
            return
        while self.running.pop() is not module:  # an error has passed through those
            pass
        self.blind -= module in self.trace.inputs
        if module in self.trace.inputs and isinstance(output, torch.Tensor):
            self.known.pop(output, None)  # changed in place, it is no longer what the producer gave
        for tensor in float_tensors(output) if self.known else ():
            self._mark_returned(module, tensor)
        if isinstance(output, torch.Tensor) and module in self.producers:
            self._follow(module, args, kwargs, output)
        if not self.running:
            self._end(output)
        elif len(self.weighted[module]) > 1:
            with self._blinded():
                self.trace.replay.add(module, output)

    def _follow(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        source = self.trace.sources.setdefault(module, Source(module))
        if len(source.calls) < MOST_SHAPES:
            with self._blinded():
                source.calls.setdefault(output.dim(), _shapes((args, kwargs)))
        if output not in self.known:
            self.known[output] = (source, False)
        if module in self.hooked:
            source.may_be_read = True

    def _mark_returned(self, module: nn.Module, tensor: torch.Tensor) -> None:
        """Notes what a module returns. If it has more weights than the producer, it is a model that others may call."""
        source, _ = self.known.get(tensor, (None, False))
        if source is not None and source.producer is not module:
            if module in self.hooked or not self.weighted[module] <= {source.producer}:
                source.may_be_read = True

    def _mark_shown(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        with_kwargs = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
        # Every module has ours, which take keywords.
        sees_keywords = any(len(hooks) > 1 for hooks in with_kwargs) or has_global_hooks()
        for tensor in float_tensors((args, kwargs if sees_keywords else {})):
            self._mark_may_be_read(tensor)

    def _end(self, output: Any) -> None:
        """Notes that the user has the output of the outermost module, and may have what is still alive after it."""
        for tensor in float_tensors(output):
            self._mark_other_use(tensor)
        for tensor in () if torch.is_grad_enabled() else list(self.known):  # a graph keeps tensors, too
            self._mark_may_be_read(tensor)
        with self._blinded():
            self.trace.replay.end(output)

    def mark_kept(self) -> None:
        """Notes that tensors to which something in Python refers, an attribute or a list, may be read one day."""
        kept = list(self.known)
        if kept:
            ids = {id(tensor): tensor for tensor in kept}
            for holder in gc.get_referrers(*kept):
                is_ours = isinstance(holder, FrameType) and holder.f_globals is globals()
                if holder is not kept and holder is not ids and not is_ours:
                    for item in gc.get_referents(holder):
                        if id(item) in ids:
                            self._mark_may_be_read(item)

    @contextmanager
    def _blinded(self) -> Iterator[None]:
        self.blind += 1
        try:
            yield
        finally:
            self.blind -= 1

    # --- functions --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not self.blind and not _is_question(name, result):
            for x in float_tensors((args, kwargs)):
                self._note_use(name, x, result)
        return result

    def _note_use(self, name: str, x: torch.Tensor, result: Any) -> None:
        """The function `name` read values of `x` and gave `result`."""
        if id(x) in self.owners:
            self._note_use_of_parameter(x)
        elif not self.known or x not in self.known or (name in PASSING_ON and result is x):
            return
        elif name in ("relu", "relu_") and isinstance(result, torch.Tensor):
            self.known[result] = (self.known[x][0], True)
        else:
            self._mark_other_use(x)

    def _note_use_of_parameter(self, parameter: torch.Tensor) -> None:
        """Modules read their own Parameters. If none of the owners is running, somebody else reads this one."""
        owners = self.owners[id(parameter)]
        if not any(owner in self.running for owner in owners):
            self.trace.read_elsewhere.update(owners)

    def _mark_other_use(self, x: torch.Tensor) -> None:
        source, _ = self.known.get(x, (None, False))
        if source is not None:
            source.has_other_use = True

    def _mark_may_be_read(self, x: torch.Tensor) -> None:
        source, _ = self.known.get(x, (None, False))
        if source is not None:
            source.may_be_read = True


def _is_question(name: str, result: Any) -> bool:
    return name in QUESTIONS and not any(True for _ in float_tensors(result))


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _shapes(value: Any) -> Any:
    """`value` with tensors on the meta device, so that nothing is kept alive."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if type(value) in (tuple, list):
        return type(value)(map(_shapes, value))
    if type(value) is dict:
        return {key: _shapes(item) for key, item in value.items()}
    return value
