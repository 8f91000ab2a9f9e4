# SPDX-License-Identifier: Apache-2.0
"""Replaces the linear layers of a model by quantized ones and reports on every layer: prepare_ to freeze_ in one call.

Everything is looked at before anything is changed, and until the first layer is frozen everything can be undone, so
that bad input leaves the model as it was. Layers are then frozen one by one: the peak is the model plus one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..base.modules import undone_on_error
from ..nn import PreparedLinear, leave_fused_paths
from ..nn.experts import experts_as_layers, joined_parameters
from ..runtime.malloc import give_back
from ..schemes import label
from .plan import Layer, plan_quantization, report_of
from .prepare import (
    NAMED,
    calibrate,
    freeze_layers,
    is_replaced,
    prepare_layer,
    prepare_layers,
    quantize_in_sequence,
    require_module,
    require_ready,
    require_root,
)
from .report import QuantizationReport
from .selection import Embeddings, LayerFilter, Patterns, SchemeLike, Selection


def quantize_(
    model: nn.Module,
    scheme: SchemeLike | Mapping[str, SchemeLike | None] | None = None,
    *,
    data: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: LayerFilter | None = None,
    include_embeddings: Embeddings = False,
    progress: bool = False,
) -> QuantizationReport:
    """Quantizes the linear layers of `model` in place and reports on every module with weights.

    Linear layers are the layers of nn.Linear and of the other classes in nn/replacements.py, such as GPT-2's Conv1D.

    scheme             a scheme, its class, or {pattern: scheme or None}: the first match decides, None keeps float
    data               for schemes that calibrate: one batch or an iterable of them, as `compare` takes; the model runs
                       on them in eval mode. Schemes that need none do not look at it
    include, exclude   patterns of layer names: fnmatch, or a regular expression after "re:"
    filter_fn          filter_fn(module, name) -> bool, asked for each layer that the patterns let through
    include_embeddings True: nn.Embedding layers as well; or patterns of their names. A head that is tied to one shares
                       its packed weight. Their codes are the nearest ones, whatever method the scheme has
    progress           tqdm bars over batches and layers
    returns            QuantizationReport. Kept float, with the reason: tied weights, parametrized layers, layers with
                       hooks, subclasses with a forward of their own, and what the scheme cannot serve
    raises             ValueError for NaN or Inf in a weight, for a pattern that matches nothing, for missing data, for
                       a layer that no batch reached, and if the model is itself a linear layer; TypeError for other
                       arguments. The model is then unchanged. An interrupt that comes when float weights are gone
                       already is raised when all layers are quantized: the model is never half converted
    """
    require_root("quantize_", model, is_replaced, "use layer = octavo.quantized(layer, scheme)")
    selection = Selection(scheme, include, exclude, filter_fn, include_embeddings)
    with undone_on_error(model) as undo, experts_as_layers(model):
        layers = plan_quantization(model, selection)
        _require_data("quantize_", layers, data)
        originals = {id(layer): layer.module for layer in layers if layer.scheme is not None}
        prepare_layers(model, layers)
        if _is_sequential(layers):
            quantize_in_sequence(model, layers, data, progress)
            undo.let_go()
        else:
            _calibrate(model, layers, data, progress)
            freeze_layers(model, layers, progress, undo, originals)
    give_back()  # else the process stays as large as with the float weights: 540 MB for 134 MB of codes
    return report_of(layers)


def quantized(
    model: nn.Module,
    scheme: SchemeLike | Mapping[str, SchemeLike | None] | None = None,
    *,
    data: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: LayerFilter | None = None,
    include_embeddings: Embeddings = False,
    progress: bool = False,
) -> nn.Module:
    """A quantized copy of `model`, which stays untouched. The arguments are the same as for `quantize_`.

    The weights that are quantized are never copied as floats. `model` may be a bare linear layer.
    """
    require_module("quantized", model)
    selection = Selection(scheme, include, exclude, filter_fn, include_embeddings)
    with experts_as_layers(model):
        layers = plan_quantization(model, selection)
        _require_data("quantized", layers, data)
        chosen = {id(layer.module) for layer in layers if layer.scheme is not None}
        copies: dict[int, object] = joined_parameters(
            model, chosen
        )  # deepcopy takes what is here for copied already
        for layer in layers:
            if layer.scheme is not None:
                key = id(layer.module)
                copies[key] = prepare_layer(layer)
        result = copied("quantized", model, copies)
    leave_fused_paths(result)
    if _is_sequential(layers) and not isinstance(result, PreparedLinear):
        quantize_in_sequence(result, layers, data, progress)
    else:
        _calibrate(result, layers, data, progress)
        result = freeze_layers(result, layers, progress)
    give_back()
    report_of(layers)
    return result


def copied(who: str, model: nn.Module, copies: dict[int, object]) -> nn.Module:
    """copy.deepcopy(model, copies), whose tensors can be trained. Errors name the function `who`.

    raises   ValueError, which names the tensors, if torch cannot copy some
    """
    with torch.inference_mode(False):
        try:
            return copy.deepcopy(model, copies)
        except RuntimeError as error:
            computed = [
                f"{name}.{key}".removeprefix(".")
                for name, module in model.named_modules()
                for key, value in {**module.__dict__, **module._buffers}.items()
                if isinstance(value, torch.Tensor) and value.grad_fn is not None
            ]
            if not computed:
                raise
            names = ", ".join(map(repr, computed[:NAMED])) + (", ..." if len(computed) > NAMED else "")
            raise ValueError(
                f"{who}: torch cannot copy tensors that were computed from parameters: {names}. If they come from "
                "torch.nn.utils.weight_norm or spectral_norm, call torch.nn.utils.remove_weight_norm(layer) or "
                "remove_spectral_norm(layer), or use those of torch.nn.utils.parametrizations; or convert the model "
                "itself, in place: octavo.quantize_(model, scheme)"
            ) from error


def _require_data(who: str, layers: list[Layer], data: Any) -> None:
    for layer in layers:
        if layer.needs_data and layer.scheme is not None and data is None:
            raise ValueError(
                f"{who}: {label(layer.scheme)} calibrates the input of {layer.name!r} and needs data: give batches, "
                f"{who}(model, scheme, data=batches), or use octavo.Int8Dynamic(), which needs none"
            )


def _is_sequential(layers: list[Layer]) -> bool:
    """Whether the method of some layer wants to see what the quantized layers before it give."""
    return any(layer.scheme is not None and layer.scheme.method.is_sequential for layer in layers)


def _calibrate(model: nn.Module, layers: list[Layer], data: Any, progress: bool) -> None:
    """Runs the data through the model if one of its layers needs that. Raises: ValueError for one that saw nothing."""
    if any(layer.needs_data for layer in layers):
        calibrate(model, layers, data, progress)
    require_ready(layers)
