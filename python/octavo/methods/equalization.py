# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: a ReLU lets positive factors through, so they can move from one linear layer to the next.

relu(x / s) = relu(x) / s for s > 0: rows of the first weight are divided by s, the same columns of the second are
multiplied by it, and the model computes what it did. s is chosen so that both weights
get the same range in each channel between them. Then neither has rows or columns that are too small for a scale of the
whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.batches import calls, evaluating
from ..base.sharing import Holders, sole_owners
from ..nn.replacements import bias_of, features_of, is_plain, matrix_of, replacement_of
from .absorbing import reason_to_stay
from .folding import Change, powers_of_two, proven, undone
from .tracing import traced

SWEEPS, SETTLED = 20, 0.01  # a layer in the middle of a chain is in two pairs: until no s is further from 1


@dataclass(frozen=True)
class EqualizedPair:
    """The names of a layer and of the layers that read its output, directly or through a ReLU."""

    first: str
    second: tuple[str, ...]


def equalize_(
    model: nn.Module, data: Any = None, *, pairs: Iterable[tuple[str, str]] | None = None
) -> list[EqualizedPair]:
    """Equalizes the ranges of successive linear layers of a float model, in place; do it before quantizing.

    data      one batch or an iterable of them, as `octavo.compare` takes; the model runs on them in eval mode to find
              the pairs: layers whose output goes through nothing but a ReLU and then into linear layers only
    pairs     instead: names (first, second), if you know them. Between them must be nothing but a ReLU or another
              function f with f(s x) = s f(x) for s > 0, and nothing else may read what is between them
    returns   the pairs, in the order in which they run; with several second layers they share one s
    raises    ValueError if neither or both are given, for names that are no linear layers, of other sizes, or tied,
              and for NaN or Inf in a weight; TypeError if model is no module. The model is then unchanged
    source    Nagel et al. 2019 (arXiv:1906.04721), section 4.1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"equalize_: model must be a torch.nn.Module, got {type(model).__name__}")
    if (data is None) == (pairs is None):
        raise ValueError("equalize_: give data, to find the pairs, or pairs, their names")
    names = _linears(model)
    found = _told(model, names, pairs) if pairs is not None else _found(model, list(names), data)
    layers: dict[Any, None] = dict.fromkeys(layer for first, second in found for layer in (first, *second))
    for layer in layers:
        if not layer.weight.isfinite().all():
            raise ValueError(f"equalize_: {names[layer]}.weight holds NaN or Inf; repair it first")
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        undone([Change(layer, in_place=True) for layer in layers]),
    ):
        for _ in range(SWEEPS):
            if max((_equalize_pair_(*pair) for pair in found), default=0.0) <= SETTLED:
                break
    return [EqualizedPair(names[first], tuple(names[layer] for layer in second)) for first, second in found]


def equalizing_scales(first_absmax: torch.Tensor, second_absmax: torch.Tensor) -> torch.Tensor:
    """s for each channel between two layers: first / sqrt(first * second); 1 where one of them is zero.

    first_absmax    [k], the largest |weight| in each row of the first layer, second_absmax in each column of the second
    source          Nagel et al. 2019 (arXiv:1906.04721), eq. 11
    """
    first, second = first_absmax.double(), second_absmax.double()
    return torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)


Pair = tuple[nn.Module, Sequence[nn.Module]]


def _equalize_pair_(first: Any, second: Sequence[Any]) -> float:
    """Equalizes one pair; returns the largest distance of s from 1."""
    second_absmax = torch.stack([matrix_of(layer).abs().amax(0) for layer in second]).amax(0)
    s = equalizing_scales(matrix_of(first).abs().amax(1), second_absmax)
    _move_(first, second, s)
    return (s - 1).abs().max().item()


def _move_(first: Any, second: Sequence[Any], s: torch.Tensor) -> None:
    """Divides the output of `first` by `s` and multiplies the input weights of `second` by `s`."""
    matrix_of(first).div_(s[:, None])
    if (bias := bias_of(first)) is not None:
        bias.div_(s)
    for layer in second:
        matrix_of(layer).mul_(s)


def _linears(model: nn.Module) -> dict[Any, str]:
    """The layers that can take part, by name: plain layers whose Parameters belong to nobody else."""
    owners, holders = sole_owners(model), Holders(model, is_plain)
    return {
        module: name
        for name, module in model.named_modules()
        if is_plain(module)
        and not reason_to_stay(module)
        and not module.weight.is_meta
        and module in owners
        and not holders.have(module, module._parameters.values())
    }


def _found(model: nn.Module, linears: list[Any], data: Any) -> list[Pair]:
    with torch.no_grad(), evaluating(model):
        with traced(model, linears) as trace:
            for args, kwargs in calls(data, "equalize_: data", model):
                model(*args, **kwargs)
        pairs: list[Any] = [(group.producer, group.consumers) for group in trace.groups()]
        found = [_Trial(pair, i) for i, pair in enumerate(pairs) if pair[0] in linears]
        with torch.inference_mode(False), torch.no_grad():
            return [trial.pair for trial in proven(model, found, trace.replay)]


class _Trial:
    """A trial of one pair: powers of two move between its weights."""

    def __init__(self, pair: Pair, number: int):
        self.pair, self.number = pair, number
        self.changes: list[Change] = []

    def try_(self) -> bool:
        first, second = self.pair
        self.changes = [Change(layer, in_place=True) for layer in (first, *second)]
        _move_(first, second, powers_of_two(len(matrix_of(first)), self.number))
        return True

    def undo_(self) -> None:
        for change in self.changes:
            change.undo_()
        self.changes = []


def _told(model: nn.Module, names: dict[Any, str], pairs: Iterable[tuple[str, str]]) -> list[Pair]:
    modules = {name: module for module, name in names.items()}
    result: list[Pair] = []
    for pair in pairs:
        first, second = pair
        for name in pair:
            if name not in modules:
                raise ValueError(
                    f"equalize_: {name!r} {_why_not(model, name)}; those that can take part are "
                    f"{', '.join(modules) or 'none'}"
                )
        given, taken = features_of(modules[first])[1], features_of(modules[second])[0]
        if given != taken:
            raise ValueError(f"equalize_: {first!r} gives {given} features and {second!r} takes {taken}")
        result.append((modules[first], [modules[second]]))
    return result


def _why_not(model: nn.Module, name: str) -> str:
    """Why the layer called `name` cannot take part."""
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None or replacement_of(module) is None:
        return "is no linear layer of the model"
    tie = "its weight is tied, or somebody else has a view of it"
    kind = "" if is_plain(module) else f"a {type(module).__name__} may compute something else"
    return f"cannot be changed: {reason_to_stay(module) or kind or tie}"
