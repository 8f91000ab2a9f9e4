# SPDX-License-Identifier: Apache-2.0
"""Which module's output is the input of which layers, and of nothing else: found by watching a model run on real data.

A module's output is known by the identity of its tensor. Modules' hooks see who calls whom; what is done to a tensor
outside of modules (a residual sum, a slice) passes through a TorchFunctionMode. Whatever is not understood counts as
another use of the tensor, so a group that is found is one in every batch that was run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .batches import float_tensors
from .nn import PreparedLinear

# Functions that read no values, and those that may give their argument back as it is.
QUESTIONS = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__"}
PASSING_ON = {"dropout", "contiguous", "to", "float"}


@dataclass
class Group:
    """`consumers` read what `producer` gives, in some cases through a ReLU, and nobody else does."""

    producer: nn.Module
    consumers: list[nn.Module]
    through_relu: bool


@dataclass(eq=False)
class Source:
    """A module that gives tensors, and what became of them."""

    producer: nn.Module
    consumers: dict[nn.Module, bool] = field(default_factory=dict)  # through a ReLU?
    has_other_use: bool = False


@dataclass
class Trace:
    """What was seen of the model."""

    sources: dict[nn.Module, Source] = field(default_factory=dict)
    inputs: dict[nn.Module, set[Source | None]] = field(default_factory=dict)  # of each layer; None: others

    def groups(self) -> list[Group]:
        """In the order in which the producers ran. A layer is in one group at most."""
        result = []
        for source in self.sources.values():
            through_relu = set(source.consumers.values())
            fed_by_it_alone = all(self.inputs[consumer] == {source} for consumer in source.consumers)
            if len(through_relu) == 1 and fed_by_it_alone and not source.has_other_use:
                result.append(Group(source.producer, list(source.consumers), through_relu.pop()))
        return result


@contextmanager
def traced(
    model: nn.Module,
    layers: Sequence[nn.Module],
    is_producer: Callable[[nn.Module], bool] = lambda module: is_linear(module) or is_norm_like(module),
) -> Iterator[Trace]:
    """Inside, runs of `model` are watched; `layers` are the modules whose inputs are asked for, and
    `is_producer` says whose output is followed.

    Scripted and compiled modules hide what they do: with one in the model, nothing is found.
    """
    trace = Trace({}, {layer: set() for layer in layers})
    if any(_hides_what_it_does(module) for module in model.modules()):
        yield trace
        return
    with ExitStack() as stack:
        watcher = stack.enter_context(_Watcher(trace, is_producer))
        for module in model.modules():
            for handle in watcher.hook(module):
                stack.callback(handle.remove)
        yield trace


def _hides_what_it_does(module: nn.Module) -> bool:
    # By name, for importing torch._dynamo takes longer than most calibrations of small models.
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"


def sole_owners(model: nn.Module) -> set[nn.Module]:
    """The modules whose parameters are nobody else's: changing those of others would change more, or untie them."""
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    return {
        m for m in model.modules() if all(p is None or owners[id(p)] == 1 for p in m._parameters.values())
    }


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, PreparedLinear)


def is_norm_like(module: nn.Module) -> bool:
    """A module of its own with a weight [k], perhaps a bias [k], and nothing else: LayerNorm, RMSNorm and their kin."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    has_more = bool(module._modules or any(b is not None for b in module._buffers.values()))
    vectors = all(p.dim() == 1 and not p.is_meta for p in parameters.values())
    return "weight" in parameters and parameters.keys() <= {"weight", "bias"} and vectors and not has_more


class _Watcher(TorchFunctionMode):
    """Sees every torch function, in Python, that is called while the mode is on."""

    def __init__(self, trace: Trace, is_producer: Callable[[nn.Module], bool]):
        super().__init__()
        self.trace, self.is_producer = trace, is_producer
        self.known: Any = WeakTensorKeyDictionary()  # tensor -> (its source, through a ReLU?)
        self.depth = 0  # of modules that are running
        self.blind = 0  # inside of a layer, or of a hook

    # --- modules ----------------------------------------------------------------------------------------------------

    def hook(self, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.depth += 1
        if module in self.trace.inputs:
            self.blind += 1
            for x in float_tensors((args, kwargs)):
                source, through_relu = self.known.get(x, (None, False))
                self.trace.inputs[module].add(source)
                if source is not None and source.consumers.setdefault(module, through_relu) != through_relu:
                    source.has_other_use = True

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.depth -= 1
        self.blind -= module in self.trace.inputs
        if module in self.trace.inputs and isinstance(output, torch.Tensor):
            self.known.pop(output, None)  # changed in place, it is no longer what the producer gave
        if isinstance(output, torch.Tensor) and self.is_producer(module):
            source = self.trace.sources.setdefault(module, Source(module))
            if output not in self.known:
                self.known[output] = (source, False)
        if self.depth == 0:  # what the outermost module gives is in the user's hands
            for tensor in float_tensors(output):
                self._mark_other_use(tensor)

    # --- functions --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.blind and self.known:
            for x in float_tensors((args, kwargs or {})):
                if x in self.known:
                    self._look(getattr(func, "__name__", ""), x, result)
        return result

    def _look(self, name: str, x: torch.Tensor, result: Any) -> None:
        holds_tensors = any(True for _ in float_tensors(result))
        if name in QUESTIONS and not holds_tensors or name in PASSING_ON and result is x:
            return
        if name in ("relu", "relu_") and isinstance(result, torch.Tensor):
            self.known[result] = (self.known[x][0], True)
            return
        self._mark_other_use(x)

    def _mark_other_use(self, x: torch.Tensor) -> None:
        source, _ = self.known.get(x, (None, False))
        if source is not None:
            source.has_other_use = True
