# SPDX-License-Identifier: Apache-2.0
"""What modules of one kind have in common, as a value to compare: classes, shapes and settings, but no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import QuantLinear
from ..nn.fused.shared_input import SharedInput

NUMBERS = ("_idx", "_index")  # how names of attributes end in which a module keeps its number in the model
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def structure_of(module: nn.Module, with_numbers: bool) -> Any:
    """A value that is equal for modules which differ only in their weights, and perhaps in their numbers in the model.

    Other objects in it are compared by identity: compare such values only while the modules exist.
    """
    return tuple(
        (name, type(child), _settings(child, with_numbers)) for name, child in module.named_modules()
    )


def comparable(value: Any) -> Any:
    """What stands for `value` in comparisons: a plain value itself, the kind of a tensor, the id of another object."""
    if isinstance(value, tuple):
        return tuple(map(comparable, value))
    if isinstance(value, torch.Tensor):
        return value.dim(), value.dtype
    return value if value is None or isinstance(value, bool | int | float | str) else id(value)


def _settings(module: nn.Module, with_numbers: bool) -> Any:
    """The shapes of a module's tensors, and everything else that it keeps in attributes."""
    if isinstance(module, QuantLinear):
        has_bias = module.bias is not None
        return module.in_features, module.out_features, has_bias, module.scheme, module.activation
    shapes = tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())
    return shapes, tuple(
        (name, comparable(value))
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES
        and type(value) is not SharedInput
        and (with_numbers or not name.endswith(NUMBERS))
    )
