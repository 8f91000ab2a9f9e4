# SPDX-License-Identifier: Apache-2.0
"""What a step of fusion is: it finds places in a model, and says of each what would stand there and how to check it.

A step changes nothing while it looks. fuse.py holds each candidate against the original on the example's tensors, lets
those that agree do their changes, and then looks at the model's output. Every change is a reference that can be put
back, so undoing a step, or all of them, is the same walk backwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..base.modules import places_of
from .example import Example

# Reasons to keep a module, whatever the step is.
MODULE_HAS_HOOKS = "has hooks: remove them, fuse, and register them on the new module"
ROOT = "the model itself cannot be replaced in place: put it into another module"

ACCELERATE = "accelerate has put hooks around its forward: fuse before you dispatch the model"


def own_forward(module: nn.Module) -> str:
    """The reason to keep a module whose forward was set on the object."""
    return ACCELERATE if hasattr(module, "_hf_hook") else "has a forward of its own"


# bound(expected, *args, **kwargs): the largest difference that is allowed, one for each element or one for all.
Bound = Callable[..., torch.Tensor | float]


class Step(Protocol):
    """One kind of fusion, an object with a name. fuse_ asks the steps one after another, so each sees what is left."""

    @property
    def name(self) -> str:
        """The step's name, as the report shows it."""

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        """All places that were looked at, in the model's order; `model` is as it was afterwards.

        `example.run()` runs the model on all batches, in eval mode without gradients, for whoever watches it.
        """


class ModuleStep(ABC):
    """A step that replaces single modules, each wherever it stands in the model."""

    name: str

    @abstractmethod
    def concerns(self, module: nn.Module) -> bool:
        """Whether `module` is of the kind that this step replaces, or nearly: the report then says why not."""

    @abstractmethod
    def look_at(self, candidate: Candidate, module: nn.Module, example: Example) -> None:
        """Fills in `candidate`: what would stand in the place of `module`, or the reason to keep it."""

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        """Looks at every module that `concerns` this step, in the model's order."""
        found = []
        for name, module in model.named_modules():
            if self.concerns(module):
                candidate = Candidate(name, type(module).__name__, ROOT if module is model else "")
                if not candidate.reason:
                    self.look_at(candidate, module, example)
                found.append(candidate)
        return found


@dataclass
class Candidate:
    """A place where a step applies, or with a reason why it does not.

    name       of the module in the model, as named_modules has it
    kind       class of what is there now
    reason     why it is kept: such a candidate is reported and nothing else
    apply      puts the replacement there, every change of a reference through the Changes it is given
    reads      the module whose call is handed to `compute`, and `gives` the one whose output `compute` must reproduce:
               the same one for a module that is replaced, a layer and the activation after it for a pair
    of_input   `compute` must reproduce what `gives` is called with, and `reads` return what `gives` does
    compute    the replacement as a function, called before anything is changed; None: the model's output alone decides
    trials     arguments for `reads`, beside the ones of the example: values for which another formula would show
    bound      how far `compute` may be off; None: it is measured and reported, and the model's output decides
    error      largest |difference| that was measured; verify.py fills it in
    partners   places that are fused together or not at all
    """

    name: str
    kind: str
    reason: str = ""
    apply: Callable[[Changes], None] | None = None
    reads: nn.Module | None = None
    gives: nn.Module | None = None
    of_input: bool = False
    compute: Callable[..., Any] | None = None
    trials: list[tuple] = field(default_factory=list)
    bound: Bound | None = None
    error: float | None = None
    partners: list[Candidate] = field(default_factory=list)


@dataclass
class Changes:
    """References that were changed in a model, in order, and what they were before.

    Kept in the fused model itself: copies of the model, by deepcopy or pickle, get copies of the modules in here.
    """

    done: list[tuple[Any, str, Any, Any]] = field(default_factory=list)

    def replace(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Puts `new` wherever `old` is in `model`, in the training mode of `old`."""
        new.train(old.training)
        for parent, attribute in places_of([old], model)[id(old)]:
            self.done.append((parent, attribute, old, new))
            parent._modules[attribute] = new

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute whose value is no module, parameter or buffer."""
        self.done.append((owner, name, vars(owner).get(name, _MISSING), value))
        vars(owner)[name] = value

    def undo(self, keep: int = 0) -> None:
        """Takes back all but the first `keep` changes, the last one first."""
        while len(self.done) > keep:
            owner, name, before, after = self.done.pop()
            if isinstance(before, nn.Module) and isinstance(after, nn.Module):
                _take_over(before, after)
                owner._modules[name] = before
            elif before is _MISSING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before


class _MISSING:
    """Stands for an attribute that was not there; a class, so that copies and pickles of it are itself."""


def _take_over(original: nn.Module, replacement: nn.Module) -> None:
    """Gives `original` what may have changed while `replacement` stood in its place: Parameters and training mode."""
    for name in original._parameters:
        if name in replacement._parameters:  # another object, if one was loaded or assigned there
            original._parameters[name] = replacement._parameters[name]
    original.train(replacement.training)
