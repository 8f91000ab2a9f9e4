# SPDX-License-Identifier: Apache-2.0
"""What a batch is, how a model is called with it, and which tensors its output holds."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .forward_arguments import labels_in, taken

logger = logging.getLogger("octavo")
# Objects whose attributes are no output of a model.
OPAQUE = (str, bytes, type, nn.Module, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


def calls(
    batches: Any, argument: str, model: nn.Module | None = None, notes: list[str] | None = None
) -> Iterator[tuple[tuple, dict]]:
    """The positional and keyword arguments of each call.

    batches    one batch or an iterable of them. A batch is a tensor, a tuple or a dict; within an iterable, a list too
    argument   what errors call it, such as "compare: batches"
    model      if given, a batch is fitted to what its forward takes: labels behind the inputs, and entries of a dict
               that forward does not know, are left out. forward_arguments.py has the rule
    notes      sentences about what was left out are added to it, each once; without it they are logged
    Raises: TypeError for anything else; ValueError for a batch that does not fit, or could be meant in two ways.
    """
    for args, kwargs, _ in labelled_calls(batches, argument, model, notes):
        yield args, kwargs


def labelled_calls(
    batches: Any, argument: str, model: nn.Module | None = None, notes: list[str] | None = None
) -> Iterator[tuple[tuple, dict, Any]]:
    """`calls`, and beside each one the labels of the batch: those that forward takes and those that are left out; None
    if it has none."""
    is_alone = isinstance(batches, torch.Tensor | tuple | Mapping)
    if is_alone:
        batches = [batches]
    elif isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{argument} is {type(batches).__name__}; "
            "a tensor, a tuple, a dict or an iterable of those is needed"
        )
    who, seen = argument.split(":")[0], set()
    _refuse_opened_batch(batches, argument)
    for batch in batches:
        if isinstance(batch, torch.Tensor):
            call: tuple[tuple, dict] = (batch,), {}
        elif isinstance(batch, Mapping):
            call = (), dict(batch)
        elif isinstance(batch, tuple | list):
            call = tuple(batch), {}
        else:
            raise TypeError(f"{who}: a batch is {type(batch).__name__}; a tensor, tuple or dict is needed")
        labels = labels_in(call[1])
        if model is not None:
            args, kwargs, note = taken(model, *call, who=who, is_alone=is_alone)
            if len(args) < len(call[0]):
                labels = call[0][-1]
            call = args, kwargs
            if note and note not in seen:
                seen.add(note)
                logger.info("%s: %s", who, note) if notes is None else notes.append(note)
        yield *call, labels


def _refuse_opened_batch(batches: Any, argument: str) -> None:
    """[x, labels], which a data loader gives for one batch, would be a batch x and a batch of labels."""
    if isinstance(batches, list) and len(batches) == 2 and all(isinstance(b, torch.Tensor) for b in batches):
        x, labels = batches
        if labels.dim() == 1 < x.dim() and len(x) == len(labels) and not labels.is_floating_point():
            raise ValueError(
                f"{argument} is a list of x and labels, and a list is taken for several batches; "
                "give one batch as a tuple: (x, labels)"
            )


def output_of(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The model's output. A key-value cache in the batch grows with each run, so each run gets a copy of it."""
    fresh = [copy.deepcopy(value) if is_cache(value) else value for value in args]
    named = {name: copy.deepcopy(value) if is_cache(value) else value for name, value in kwargs.items()}
    return model(*fresh, **named)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, all of `models` are in eval mode; afterwards every module's training flag is what it was."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def float_tensors(output: Any) -> Iterator[torch.Tensor]:
    """Gives every floating-point tensor in an output, in order: in tuples, lists, sets, dicts, dataclasses and
    attributes of any other object, nested or not.

    Complex tensors are given as pairs of floats, sparse ones as dense ones, nested ones item by item. A key-value
    cache is no output, but what the next call needs: it is not looked into, and neither are modules.
    """
    yield from _float_tensors(output, set())


def _float_tensors(output: Any, inside: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield from _plain_floats(output)
        return
    if id(output) in inside:  # an object that holds itself
        return
    inside = inside | {id(output)}
    for value in _parts(output):
        yield from _float_tensors(value, inside)


def _plain_floats(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.is_nested:
        for each in tensor.unbind():
            yield from _plain_floats(each)
    elif tensor.layout is not torch.strided:
        yield from _plain_floats(tensor.to_dense())
    elif tensor.is_complex():
        yield torch.view_as_real(tensor.resolve_conj())
    elif tensor.is_floating_point():
        yield tensor


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):  # dicts and transformers' ModelOutput
        return output.values()
    if isinstance(output, tuple | list | set | frozenset | deque):
        return output
    if isinstance(output, OPAQUE) or is_cache(output):
        return ()
    slots = [name for kind in type(output).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    named = {name: getattr(output, name, None) for name in slots if name not in ("__dict__", "__weakref__")}
    return {**named, **getattr(output, "__dict__", {})}.values()


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def is_cache(value: Any) -> bool:
    """Whether `value` is a key-value cache, as transformers and octavo have them."""
    return hasattr(type(value), "get_seq_length")
