# SPDX-License-Identifier: Apache-2.0
"""Which part of a batch a model's forward takes, and which part is labels: one rule for all functions that run batches.

Data loaders give (x, labels), and tokenizers give entries that not every model knows. What forward has no place for is
left out, and a note says so. A value that looks like labels is refused if forward would take it: only the user can
tell what is meant.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

Parameters = list[inspect.Parameter]
LABELS = ("labels", "label")  # their names in dicts
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def parameters_of(model: nn.Module) -> Parameters:
    """The parameters of forward. Where torch has wrapped the model, they are those of the model inside."""
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        inner: Any = getattr(model, "_orig_mod", None)
        model = model.get_submodule("module") if inner is None else inner
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # not written in Python
        return [
            inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]


def positional(parameters: Parameters) -> Parameters | None:
    """The parameters that a tuple can fill, in order; None if forward takes any number of arguments."""
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return [parameter for parameter in parameters if parameter.kind in POSITIONAL]


def labels_in(kwargs: dict[str, Any]) -> Any:
    """The labels among the entries of a batch; None if there are none."""
    return next((kwargs[name] for name in LABELS if name in kwargs), None)


def arguments_by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; those for which forward has no name are left out."""
    places = positional(parameters_of(model)) or []
    return {**{place.name: value for place, value in zip(places, args, strict=False)}, **kwargs}


def taken(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    who: str,
    is_alone: bool = False,
    is_input: bool = False,
) -> tuple[tuple, dict[str, Any], str]:
    """The part of the batch that forward takes, and a sentence about the rest of it, "" if there is none.

    is_alone   the batch was given by itself, not in a list: a tuple then may be meant as several batches
    is_input   the caller knows that whatever forward has a place for is no labels
    Raises: ValueError for a batch that could be meant in two ways, or of which forward takes nothing.
    """
    parameters = parameters_of(model)
    if kwargs:
        return _taken_entries(parameters, kwargs, who)
    places = positional(parameters)
    if not places or len(args) < 2:
        return args, kwargs, ""
    last = args[-1]
    if len(args) <= len(places):
        place = places[len(args) - 1]
        is_optional = place.default is not inspect.Parameter.empty
        if is_optional and not is_input and _looks_like_labels(last, args[0], place.name):
            raise ValueError(
                f"{who}: a batch of {described(args, kwargs)} may end with labels, or with what forward calls "
                f"{place.name!r}. Give a dict that names the inputs, or leave the labels out"
            )
        return args, kwargs, ""
    if len(args) > len(places) + 1:
        raise ValueError(
            f"{who}: a batch of {described(args, kwargs)} is more than the model takes, which is "
            f"{_names(places)}. A tuple is one batch: put batches into a list"
        )
    if not _may_be_labels(last, args[0]) or (is_alone and _are_alike(last, args[0])):
        raise ValueError(
            f"{who}: a batch of {described(args, kwargs)} is more than the model takes, which is "
            f"{_names(places)}. A tuple is one batch: put batches into a list, a single (x, labels) as well"
        )
    return args[:-1], kwargs, "the last value of each batch is taken for labels and not used"


def _taken_entries(
    parameters: Parameters, kwargs: dict[str, Any], who: str
) -> tuple[tuple, dict[str, Any], str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {parameter.name for parameter in parameters if parameter.kind in kinds}
    found = {name: value for name, value in kwargs.items() if name in known}
    others = ", ".join(name for name in kwargs if name not in known)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        note = f"forward does not name what it gets as {others}" if others and found else ""
        return (), kwargs, note
    if others and not found:
        raise ValueError(
            f"{who}: a batch has {', '.join(map(repr, kwargs))}, and forward takes none of them, only "
            f"{', '.join(map(repr, sorted(known))) or 'positional arguments: give a tuple'}"
        )
    return (), found, f"not used, for forward does not take it: {others}" if others else ""


def _looks_like_labels(value: Any, x: Any, place: str) -> bool:
    """Whether `value` holds one number for each row of x, or numbers that are neither a mask nor positions."""
    if not isinstance(value, torch.Tensor) or not isinstance(x, torch.Tensor):
        return False
    if value.dim() == 0 or x.dim() < 2 or len(value) != len(x) or value.dtype == torch.bool:
        return False
    if value.dim() == 1 or value.shape[1:] == (1,):
        return True
    if value.is_floating_point() or value.is_complex() or value.numel() == 0:
        return False
    return bool((value < 0).any()) or ("mask" in place and bool((value > 1).any()))


def _may_be_labels(value: Any, x: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(x, torch.Tensor):
        return value.dim() == 0 or x.dim() == 0 or len(value) == len(x)
    return True


def _are_alike(value: Any, x: Any) -> bool:
    tensors = isinstance(value, torch.Tensor) and isinstance(x, torch.Tensor)
    return tensors and value.dim() > 1 and value.dtype == x.dtype and value.shape[1:] == x.shape[1:]


def _names(places: Parameters) -> str:
    return ", ".join(repr(place.name) for place in places)


def described(args: tuple, kwargs: dict[str, Any]) -> str:
    """The dtypes and shapes of a batch, for errors."""
    if kwargs:
        return "{" + ", ".join(f"{name}: {_one(value)}" for name, value in kwargs.items()) + "}"
    return "(" + ", ".join(map(_one, args)) + ")"


def _one(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
