# SPDX-License-Identifier: Apache-2.0
"""Bias correction: what rounding adds to an output on average is subtracted from the bias.

Rounding errors of a weight are small and of both signs, but inputs are not centred: their mean times the errors is a
shift of each output, the same for all rows. It costs nothing to remove.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..base.batches import calls, evaluating, output_of
from ..base.hooks import hooked
from ..base.modules import undone_on_error
from ..base.padding import Padding
from ..base.progress import with_bar
from ..base.sharing import Holders, sole_owners
from ..nn import OurEmbedding, OurLinear, PreparedLinear, StaticQuantLinear, without_nested_tensors
from ..nn.replacements import features_of, is_plain, replacement_of
from .absorbing import reason_to_keep_bias
from .rescaling import Factors, Rescaling

Batch = tuple[tuple, dict]


def correct_bias_(
    model: nn.Module, reference: nn.Module, data: Any, *, progress: bool = False
) -> dict[str, torch.Tensor]:
    """Corrects the biases of the quantized or prepared layers of `model`, in place, on calibration data.

    The layers are taken in the order in which they run, so each is corrected for what is left of the errors before it:
    the model runs on `data` once for each layer. A layer without a bias gets one. Any scheme will do.

    reference  the float model, with the same module names: reference, model = model, octavo.quantized(model, scheme)
    data       one batch or an iterable of them, as `octavo.compare` takes; both models run on them in eval mode. Padded
               positions are left out, as `compare` leaves them out
    progress   a tqdm bar over the layers
    returns    {name: float32 [n], what was subtracted from the bias}, in the order of running
    raises     ValueError if a layer has no counterpart in reference, runs in one model only, gives NaN or Inf, or has
               hooks, a forward of its own or a pruned bias, if data is empty or all padding, and if SmoothQuant's
               folding or `equalize_` has rescaled a layer by factors that cannot be told; TypeError for what is no
               module or no batch. The model is then unchanged
    source     Nagel et al. 2019 (arXiv:1906.04721), section 4.2 and appendix D, the empirical form
    """
    layers = _layers(model, reference)
    _require_plain(layers)
    writable = _writable(model, layers)
    batches = list(calls(data, "correct_bias_: data", reference))
    if not batches:
        raise ValueError("correct_bias_: data is empty; give at least one batch")
    counterparts = {name: reference.get_submodule(name) for name in layers}
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.no_grad(), evaluating(model, reference)):
            stack.enter_context(context)
        stack.enter_context(without_nested_tensors(model, reference))
        stack.enter_context(undone_on_error(model))
        masked = _Batches(reference, batches)
        factors = _factors(model, reference, layers, batches)
        expected = masked.means(reference, counterparts)
        shifts = {}
        for name in with_bar(expected, "correcting biases", "layer", progress):
            found = masked.means(model, {name: layers[name]})
            if name not in found or found[name].rows != expected[name].rows:
                raise ValueError(f"correct_bias_: layer {name!r} runs more often in one of the models")
            shift = found[name].mean - factors(name).taken(expected[name].mean)
            if not shift.isfinite().all():
                raise ValueError(f"correct_bias_: layer {name!r} gives NaN or Inf on this data")
            _subtract_(layers[name], shift, counterparts[name], in_place=name in writable)
            shifts[name] = shift.float()
    if not shifts:
        raise ValueError(
            "correct_bias_: no position counts: no layer ran on this data, or the mask leaves out all positions"
        )
    return shifts


def _factors(
    model: nn.Module, reference: nn.Module, layers: dict[str, Any], batches: list[Batch]
) -> Callable[[str], Factors]:
    """A function that gives the factors by which a layer was rescaled, and raises ValueError if they are unknown."""
    rescaling = Rescaling(
        reference, model, {name: (reference.get_submodule(name), layer) for name, layer in layers.items()}
    )
    for args, kwargs in batches:
        rescaling.look_at(args, kwargs)

    def known(name: str) -> Factors:
        factors = rescaling.factors(name)
        if factors is None:
            raise ValueError(
                f"correct_bias_: layer {name!r} seems rescaled against reference, by factors that cannot be told. Give "
                "the float model that was quantized, with the weights that it had then"
            )
        return factors

    return known


class _Batches:
    """The batches, and for each of them the positions that count."""

    def __init__(self, reference: nn.Module, batches: list[Batch]):
        self._padding = Padding(reference)
        self._batches = [(*batch, self._padding.masks(*batch)) for batch in batches]

    def means(self, model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, _Mean]:
        """The mean outputs of the `layers` that saw at least one row, in the order in which they first ran."""
        means: dict[str, _Mean] = {}
        for args, kwargs, masks in self._batches:

            def update(name: str, _: nn.Module, args: Any, kwargs: Any, y: Any, masks: Any = masks) -> None:
                means.setdefault(name, _Mean()).update(self._padding.rows(y, masks, has_channels=True))

            with hooked((layer, partial(update, name)) for name, layer in layers.items()):
                output_of(model, args, kwargs)
        return {name: mean for name, mean in means.items() if mean.rows}


class _Mean:
    """The mean of each output over all rows that a layer gives, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum: Any = 0.0

    def update(self, y: torch.Tensor) -> None:
        rows = y.detach().reshape(-1, y.shape[-1])
        self.rows += len(rows)
        self.sum = self.sum + rows.double().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        return self.sum / self.rows


def _layers(model: nn.Module, reference: nn.Module) -> dict[str, Any]:
    for argument, module in (("model", model), ("reference", reference)):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"correct_bias_: {argument} is {type(module).__name__}, a torch.nn.Module is needed"
            )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OurLinear) and not isinstance(module, OurEmbedding)
    }
    if not layers:
        raise ValueError("correct_bias_: model has no quantized layers; quantize it first")
    counterparts = dict(reference.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        other: Any = counterparts.get(name)
        sizes = (layer.in_features, layer.out_features)
        is_linear = other is not None and replacement_of(other) is not None
        if not is_linear or features_of(other) != sizes:
            raise ValueError(
                f"correct_bias_: reference has no linear layer {name!r} with {sizes[1]} outputs of {sizes[0]} inputs; "
                "give the float model that was quantized"
            )
    return layers


def _require_plain(layers: dict[str, Any]) -> None:
    """Raises ValueError for a layer whose output would not follow the bias."""
    for name, layer in layers.items():
        reason = reason_to_keep_bias(layer)
        if reason:
            raise ValueError(f"correct_bias_: the bias of layer {name!r} cannot be changed: {reason}")


def _writable(model: nn.Module, layers: dict[str, Any]) -> set[str]:
    """The layers whose bias belongs to nobody else: it is changed in place, for an optimizer may train it."""
    owners, holders = sole_owners(model), Holders(model, is_plain)
    return {
        name
        for name, layer in layers.items()
        if layer in owners and not holders.have(layer, [layer.bias], or_view=False)
    }


def _subtract_(layer: Any, shift: torch.Tensor, reference: Any, *, in_place: bool) -> None:
    """Subtracts `shift` from the bias: in place, or as a new Parameter, because another model may have the old one."""
    is_static = isinstance(layer, StaticQuantLinear)
    old = layer.float_bias() if is_static else layer.bias
    if old is None:
        dtype = reference.weight.dtype
        layer.bias = nn.Parameter((-shift).to(dtype), requires_grad=isinstance(layer, PreparedLinear))
    elif in_place and not is_static and not old.is_inference():
        old.copy_(old.double() - shift)
    else:
        layer.bias = nn.Parameter((old.double() - shift).to(old.dtype), requires_grad=old.requires_grad)
    if is_static:
        layer.quantize_bias_()
