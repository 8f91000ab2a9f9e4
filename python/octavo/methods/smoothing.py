# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's step between calibration and quantizing: chooses s for each layer and finds who divides by it.

Layers that read the same output of a norm or a linear layer share one s, and that producer gives its output divided by
s from then on: two small tensors change, no layer computes more. Each other layer has an s for itself and divides its
input by it. Either way the float model computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..base.modules import undone_on_error
from ..base.sharing import Holders, sole_owners
from ..nn import PreparedLinear, PreparedSmoothed
from ..nn.replacements import is_plain, matrix_of
from .absorbing import is_norm_like, is_plain_linear, reason_to_stay
from .base import RoundToNearest
from .folding import Divided, powers_of_two, proven, undone
from .tracing import Group, Trace, traced

Choose = Callable[[Sequence[PreparedSmoothed]], torch.Tensor]

SMALLEST, LARGEST = 2.0**-40, 2.0**40  # s, so that neither 1 / s nor weight * s leaves float32


@contextmanager
def smoothing(
    model: nn.Module,
    calibrated: Sequence[nn.Module],
    *,
    in_place: bool = True,
    choose: Choose | None = None,
) -> Iterator[None]:
    """Watches the layers in `calibrated`; on exit smooths those that saw data and were prepared for it.

    choose     gives one s [k] for layers that read the same input; None: `choose_smoothing`
    in_place   True: linear layers that absorb an s keep their Parameters, which an optimizer may have; False: they
               get new ones, because another model has the same Parameters
    raises   ValueError if a scheme's `fold` names what is not there. After an error no layer is smoothed
    """
    choose = choose or choose_smoothing
    layers = [m for m in calibrated if isinstance(m, PreparedSmoothed) and not m.is_smoothed]
    if not layers:
        yield
        return
    told = _told_groups(model, layers)
    with traced(model, [layer for layer in layers if _method(layer).fold is True]) as trace:
        yield
    for group in told:
        group.calls = trace.calls_of(group.producer)
    with torch.inference_mode(False), torch.no_grad(), undone_on_error(model):
        _fold_(model, [*told, *_found_groups(trace)], trace, in_place, choose)
        for layer in layers:
            if not layer.is_smoothed and layer.channel_observer.is_initialized:
                layer.smooth_(choose([layer]), folded=False)


def _fold_(model: nn.Module, groups: Sequence[Group], trace: Trace, in_place: bool, choose: Choose) -> None:
    """Folds one s for all layers of a group into the producer, where that is shown to change nothing."""
    candidates = _candidates(model, groups, in_place)
    folds = [fold for fold in candidates if fold.divided.find_form()]
    can_try = (
        trace.replay.calls or trace.replay.is_lost
    )  # else the user has told the groups, and was not watched
    if can_try:
        folds = proven(model, folds, trace.replay)
    with undone(folds):
        for fold in folds:
            fold.smooth_(choose)


# --- who shares an s ------------------------------------------------------------------------------------------------


def _found_groups(trace: Trace) -> list[Group]:
    return [group for group in trace.groups() if len({layer.scheme for layer in group.consumers}) == 1]


def _told_groups(model: nn.Module, layers: Sequence[PreparedSmoothed]) -> list[Group]:
    """The groups that the schemes of the layers name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = []
    for fold in dict.fromkeys(_method(layer).fold for layer in layers):
        for name, consumers in () if isinstance(fold, bool) else fold:
            for each in (name, *consumers):
                if each not in modules:
                    raise ValueError(f"SmoothQuant: fold names {each!r}, which the model does not have")
            found = [modules[each] for each in consumers]
            if not (is_plain_linear(modules[name]) or is_norm_like(modules[name])):
                kind = type(modules[name]).__name__
                raise ValueError(
                    f"SmoothQuant: fold names {name!r}, a {kind}; it must be a linear layer, or a norm whose "
                    "parameters are a weight [k] and perhaps a bias [k]"
                )
            obstacle = reason_to_stay(modules[name])
            if obstacle:
                raise ValueError(f"SmoothQuant: fold names {name!r}, which cannot be changed: {obstacle}")
            if not set(found) <= set(layers):
                raise ValueError(f"SmoothQuant: not all of {list(consumers)} are layers that it smooths")
            groups.append(Group(modules[name], found, False))
    return groups


def _candidates(model: nn.Module, groups: Sequence[Group], in_place: bool) -> list[_SmoothFold]:
    """The groups that can be tried: the producer belongs to nobody else; none divides twice or multiplies twice."""
    owners, holders = sole_owners(model), None
    producers: set[nn.Module] = set()
    taken: set[nn.Module] = set()
    result = []
    for number, group in enumerate(groups):
        producer, layers = group.producer, set(group.consumers)
        width = _width(producer)
        is_ready = width is not None and all(_waits_for(layer, width) for layer in group.consumers)
        may_change = not any(reason_to_stay(module) for module in (producer, *layers))
        if not (is_ready and may_change and producer in owners) or producer in producers or layers & taken:
            continue
        writes = in_place or not is_plain_linear(producer)
        if writes:
            holders = holders or Holders(model, is_plain)
            if holders.have(producer, producer._parameters.values()):
                continue
        producers.add(producer)
        taken |= layers
        result.append(_SmoothFold(group, number, in_place=writes))
    return result


def _width(producer: nn.Module) -> int | None:
    """How many channels `producer` gives; None if it has no weight."""
    weight: Any = producer._parameters.get("weight")
    if weight is None:
        return None
    return len(matrix_of(producer) if is_plain_linear(producer) else weight)


def _waits_for(layer: Any, k: int) -> bool:
    """Whether `layer` has seen data and can be given an s [k]."""
    return layer.channel_observer.is_initialized and layer.in_features == k and not layer.is_smoothed


def _method(layer: Any) -> Any:
    return layer.scheme.method


class _SmoothFold:
    """One fold: the producer of a group divides its output by s, and the layers multiply their weights by s."""

    def __init__(self, group: Group, number: int, *, in_place: bool):
        self.layers: list[Any] = group.consumers
        self.divided = Divided(group.producer, group.calls, in_place=in_place)
        self.number = number
        self.tried: list[Any] = []

    def try_(self) -> bool:
        s = self.divided.exact(powers_of_two(self.divided.k, self.number))
        if not self.divided.by_(s):
            return False
        for layer in self.layers:
            layer.try_smoothing_(s)
            self.tried.append(layer)
        return True

    def undo_(self) -> None:
        self.divided.undo_()
        while self.tried:
            self.tried.pop().end_trial_()

    def smooth_(self, choose: Choose) -> None:
        """Folds for good, if the producer gives what it should."""
        s = choose(self.layers)
        largest = max((layer.input_absmax / s).max() for layer in self.layers)
        fits = largest <= torch.finfo(self.divided.producer.weight.dtype).max / 2  # float16 ends early
        if fits and self.divided.by_(s):
            producer = self.divided.producer
            if isinstance(producer, PreparedLinear):
                producer.reset_weight_scale_()
            for layer in self.layers:
                layer.smooth_(s, folded=True)


# --- s --------------------------------------------------------------------------------------------------------------


def smoothing_scales(input_absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """s for each channel: input_absmax ^ alpha / weight_absmax ^ (1 - alpha); 1 for a channel that is always zero.

    input_absmax, weight_absmax   float32 [k], the largest |x| and |weight| in each channel
    source   Xiao et al. 2023 (arXiv:2211.10438), eq. 4. There 1e-5 is the least weight_absmax and the least s; here the
             least weight_absmax is 1e-5 of the largest, so that the units do not matter
    """
    x, w = input_absmax.double(), weight_absmax.double()
    w = w.clamp_min(1e-5 * w.max().item())
    s = (x**alpha / w ** (1 - alpha)).clamp(SMALLEST, LARGEST)
    return torch.where((x > 0) & (w > 0), s, 1.0).float()


def choose_smoothing(layers: Sequence[PreparedSmoothed]) -> torch.Tensor:
    """One s [k] for `layers`, which read the same input; of several alphas the one with the closest output."""
    input_absmax = torch.stack([layer.input_absmax for layer in layers]).amax(0)
    weight_absmax = torch.stack(
        [layer.weight_matrix.detach().float().abs().amax(0) for layer in layers]
    ).amax(0)
    alphas = _method(layers[0]).alphas
    candidates = [smoothing_scales(input_absmax, weight_absmax, alpha) for alpha in alphas]
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda s: sum(output_error(layer, s) for layer in layers))


def output_error(layer: PreparedSmoothed, s: torch.Tensor) -> float:
    """Mean squared error of the output on the layer's sample, if it were smoothed by `s` and quantized."""
    if not layer.sample:  # the layer was saved and loaded in the middle
        return 0.0
    x, weight = torch.cat(layer.sample), layer.weight_matrix.detach().float()
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight * s)
    scheme: Any = layer.scheme
    trial = replace(scheme, method=RoundToNearest()).prepare_linear(linear)
    trial.is_calibrating = True
    exact = trial(x / s)
    trial(_largest(layer, s))
    trial.is_calibrating = False
    trial.take_input_qparams_()
    return (trial(x / s) - exact).square().mean().item()


def _largest(layer: PreparedSmoothed, s: torch.Tensor) -> torch.Tensor:
    """A row with the largest element of the smoothed input, which the sample may have missed, and zeros."""
    row = layer.input_absmax / s
    return torch.where(row == row.max(), row, 0.0)[None]
