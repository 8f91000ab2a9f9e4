# SPDX-License-Identifier: Apache-2.0
"""Tensors that a model of transformers computes instead of reading: rotary frequencies, position tables, token types.

Files need not hold them, and a skeleton on the meta device has no values for them. transformers fills them after
every load by `_init_weights`, module by module, and so does this file, with a copy of the module that holds nothing
else. That method draws weights at random, too. So it runs twice, from different beginnings: what comes out equal was
computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn


def transient_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values of the buffers on the meta device that no file holds, because state_dict leaves them out."""
    return values(
        model,
        [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            for name in sorted(module._non_persistent_buffers_set)
            if getattr(module._buffers.get(name), "is_meta", False)
        ],
    )


def may_be_missing(model: nn.Module, missing: Iterable[str]) -> dict[str, torch.Tensor]:
    """The values of those `missing` names that transformers does not expect in a file, if they can be computed.

    It keeps a list of such names for each class. Whole numbers, such as indices of positions, were in no older file.
    """
    patterns = _patterns(model, "_keys_to_ignore_on_load_missing")
    state = model.state_dict(keep_vars=True)
    wanted = [
        name
        for name in missing
        if isinstance(state[name], torch.Tensor)  # and no extra state
        and (any(pattern.search(name) for pattern in patterns) or not _is_real(state[name]))
    ]
    return values(model, wanted)


def may_be_left_over(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Which `names` in a file transformers passes over without a word, or `model` computes itself."""
    patterns = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name for name in names if name in buffers or any(pattern.search(name) for pattern in patterns)}


def values(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Values of those parameters and buffers in `names` that the classes of `model` compute; `model` is not changed."""
    leaves_of: dict[str, list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        leaves_of.setdefault(owner, []).append(leaf)
    found = {}
    for owner, leaves in leaves_of.items():
        root = _model_around(model, owner)
        if root is None:
            continue
        module = model.get_submodule(owner)
        first, second = (_initialized(root, module, leaves, beginning) for beginning in (0, 1))
        for leaf in leaves:
            if leaf in first and torch.equal(first[leaf], second[leaf]):
                found[f"{owner}.{leaf}" if owner else leaf] = first[leaf]
    return found


def _initialized(root: Any, module: nn.Module, leaves: list[str], beginning: int) -> dict[str, torch.Tensor]:
    """What `root._init_weights` makes of tensors full of `beginning`; nothing if it cannot do without the others."""
    twin = deepcopy(module, _without_values(module))
    for leaf in leaves:
        place: dict[str, Any] = twin._parameters if leaf in twin._parameters else twin._buffers
        old = place[leaf]
        new = torch.full(old.shape, beginning, dtype=old.dtype, device="cpu")
        place[leaf] = nn.Parameter(new, requires_grad=False) if leaf in twin._parameters else new
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(beginning)
        try:
            root._init_weights(twin)
        except (RuntimeError, NotImplementedError):  # torch's, of meta tensors that were asked for values
            return {}
    return {leaf: getattr(twin, leaf).detach() for leaf in leaves}


def _without_values(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, by which tensors of `module` get onto the meta device and configs are not copied."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for parameter in inner._parameters.values():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        for buffer in inner._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        for value in vars(inner).values():
            if hasattr(value, "to_diff_dict"):
                memo[id(value)] = value
    return memo


def _model_around(model: nn.Module, owner: str) -> Any:
    """The innermost model of transformers that `owner` is or lies in; None if there is none."""
    parts = owner.split(".") if owner else []
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if hasattr(type(module), "config_class") and hasattr(module, "_init_weights"):
            return module
    return None


def _patterns(model: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    found = {pattern for module in model.modules() for pattern in getattr(module, attribute, None) or ()}
    return [re.compile(pattern) for pattern in sorted(found)]


def _is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
