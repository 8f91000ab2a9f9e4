# SPDX-License-Identifier: Apache-2.0
"""How a block is called: which of its arguments are tensors, and which values the others must have.

A fused block was made for one way to be called: tensors for some arguments, None or False for others. Each call is
compared with that. Calls with as many positional arguments and the same keywords have one form; where each argument is
found in a call is worked out once for each form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_NOT_GIVEN = -1  # index of the None that is appended to the values of a call


@dataclass
class ForwardParameters:
    """The parameters of a function: the names of the positional ones in order, and all defaults."""

    positional: list[str]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> ForwardParameters:
        parameters = inspect.signature(function).parameters.values()
        return cls(
            [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)],
            {p.name: p.default for p in parameters if p.default is not p.empty},
        )

    def named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments of a call by name, without defaults; those that end in *args are "args.0", "args.1", ..."""
        names = self.positional[: len(args)]
        names = names + [f"args.{number}" for number in range(len(args) - len(names))]
        return {**dict(zip(names, args, strict=True)), **kwargs}


@dataclass
class _Form:
    """Where things are among the values of a call: indices of the tensors in the order of slots, then of tuples of
    tensors and how many each has; and the values that must be what they were."""

    tensors: list[int]
    tuples: list[tuple[int, int]]
    fixed: list[tuple[int, Any]]


@dataclass
class BlockCall:
    """The way to be called that a block was fused for.

    parameters  of the block's forward
    tensors     names of arguments that are tensors, in the order of their slots; the first one is the block's input
    tuples      name -> how many tensors it has; their slots come after those of `tensors`
    fixed       name -> value, of all other arguments
    mask        the one of `tensors` that may also be None
    """

    parameters: ForwardParameters
    tensors: list[str] = field(default_factory=list)
    tuples: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    mask: str | None = None
    _forms: dict[tuple, _Form | None] = field(default_factory=dict)

    @classmethod
    def like(cls, block: nn.Module, args: tuple, kwargs: dict) -> BlockCall:
        """Calls with tensors where this one has them, and its other values. Raises: TypeError for other objects."""
        call = cls(ForwardParameters.of(block.forward))
        for name, value in call.parameters.named(args, kwargs).items():
            if isinstance(value, torch.Tensor):
                call.tensors.append(name)
            elif isinstance(value, tuple | list) and all(isinstance(item, torch.Tensor) for item in value):
                call.tuples[name] = len(value)
            elif value is None or isinstance(value, bool | int | float | str):
                call.fixed[name] = value
            else:
                raise TypeError(f"its argument {name} is a {type(value).__name__}")
        return call

    def slot_names(self) -> list[str]:
        """The tensors in the order of their slots, items of a tuple as "name.0", "name.1", ..."""
        items = [f"{name}.{number}" for name, count in self.tuples.items() for number in range(count)]
        return [*self.tensors, *items]

    def slots(self, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """The tensors of a call in their slots, or None if it is another kind of call."""
        key = (len(args), *kwargs)
        if key not in self._forms:
            self._forms[key] = self._form(args, kwargs)
        form = self._forms[key]
        if form is None:
            return None
        values = (*args, *kwargs.values(), None)
        for index, value in form.fixed:
            found = values[index]
            if found is not value and (type(found) is not type(value) or found != value):
                return None
        slots = [values[index] for index in form.tensors]
        for index, count in form.tuples:
            if not isinstance(values[index], tuple | list) or len(values[index]) != count:
                return None
            slots.extend(values[index])
        for slot, value in enumerate(slots):
            if not isinstance(value, torch.Tensor) and (
                value is not None or self.mask is None or self.tensors[slot] != self.mask
            ):
                return None
        return slots

    def _form(self, args: tuple, kwargs: dict[str, Any]) -> _Form | None:
        given = self.parameters.named(args, kwargs)
        index = {name: number for number, name in enumerate(given)}
        if not set(self.tuples) <= set(index) or not set(self.tensors) - {self.mask} <= set(index):
            return None
        fixed = []
        for name in {**given, **self.fixed}:
            if name in self.tensors or name in self.tuples:
                continue
            default = self.parameters.defaults.get(name)
            value = self.fixed.get(name, default)
            if name in index:
                fixed.append((index[name], value))
            elif value is not default and value != default:
                return None
        tensors = [index.get(name, _NOT_GIVEN) for name in self.tensors]
        tuples = [(index[name], count) for name, count in self.tuples.items()]
        return _Form(tensors, tuples, fixed)
