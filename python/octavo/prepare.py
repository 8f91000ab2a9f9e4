# SPDX-License-Identifier: Apache-2.0
"""The way to integers in steps: prepare_, then calibrate and train as long as you like, then freeze_.

A prepared layer still has its float weight and computes what the frozen one will (nn/prepared.py). Each step looks at
everything before it changes anything, and may be followed by saving and loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .batches import calls, evaluating
from .compressed_tensors import set_quantization_config
from .matching import LayerFilter, Patterns, SchemeLike, Selection
from .nn import PreparedLinear, leave_fused_paths
from .plan import Layer, plan_freezing, plan_quantization, report_of, require_finite
from .progress import with_bar
from .report import QuantizationReport
from .smoothing import smoothing
from .swap import places_of, replace_at, undone_on_error


def prepare_(
    model: nn.Module,
    scheme: SchemeLike | Mapping[str, SchemeLike | None],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: LayerFilter | None = None,
    estimator: str = "clipped",
    learn_scales: bool = False,
) -> QuantizationReport:
    """Replaces the nn.Linear layers of `model`, in place, by PreparedLinear ones that hold the same Parameters.

    scheme, include, exclude, filter_fn   as in `quantize_`
    estimator      the gradient of rounding while training: "clipped" is 0 for values out of range, "pure" 1 everywhere
    learn_scales   train the scales and zero points, too: they become Parameters, so make the optimizer after this call
    returns        QuantizationReport, whose rows say "prepared" or "kept"
    raises         as `quantize_`; ValueError for another estimator. The model is then unchanged
    """
    require_root("prepare_", model, nn.Linear, "wrap it: nn.Sequential(layer)")
    layers = plan_quantization(model, Selection(scheme, include, exclude, filter_fn))
    with undone_on_error(model):
        prepare_layers(model, layers, estimator=estimator, learn_scales=learn_scales)
    return report_of(layers)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, prepared layers are float layers whose observers watch; on leaving, their input scales are set.

    Several blocks add up: what was seen before still counts. SmoothQuant chooses its smoothing on leaving the first one
    and folds it into norms and linear layers; with Int8Static it needs a second one, over the same data. Training mode
    is left as it is: call model.eval() first if there is dropout, and torch.no_grad() saves memory.
    raises   ValueError if the model has no prepared layers; TypeError if it is no module
    """
    require_module("calibrating", model)
    layers = [module for module in model.modules() if isinstance(module, PreparedLinear)]
    if not layers:
        raise ValueError(
            "calibrating: the model has no prepared layers; call octavo.prepare_(model, scheme) first"
        )
    with _watching(model, layers):
        yield


def freeze_(model: nn.Module, *, progress: bool = False) -> QuantizationReport:
    """Replaces the prepared layers of `model`, in place, by integer layers with the codes that they have now.

    Nothing is trained after that: weights are codes and scales are frozen. A second call does nothing.
    progress   a tqdm bar over the layers
    returns    QuantizationReport
    raises     ValueError for a layer that is not calibrated, for NaN or Inf in a weight, inside `calibrating`, and if
               the model is itself a prepared layer; TypeError if it is no module. The model is then unchanged
    """
    require_root("freeze_", model, PreparedLinear, "use layer = layer.scheme.freeze(layer)")
    layers = plan_freezing(model)
    require_ready(layers)
    freeze_layers(model, layers, progress)
    return report_of(layers)


# --- the steps, for quantize_ as well -------------------------------------------------------------------------------


def prepare_layers(model: nn.Module, layers: list[Layer], **options: Any) -> None:
    """Puts a prepared layer in the place of each layer that has a scheme."""
    places = places_of((layer.module for layer in layers), model)
    for layer in layers:
        if layer.scheme is not None:
            at = places[id(layer.module)]
            replace_at(at, prepare_layer(layer, **options))
    leave_fused_paths(model)


def prepare_layer(layer: Layer, **options: Any) -> PreparedLinear:
    """The prepared form of one layer, which the plan now names instead of the float one."""
    assert layer.scheme is not None
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be saved for backward
        prepared = layer.scheme.prepare_linear(layer.module, **options)
    prepared.name = layer.name
    layer.becomes(prepared, "prepared")
    return prepared


def calibrate(model: nn.Module, layers: list[Layer], data: Any, progress: bool) -> None:
    """Runs the batches of `data` through the model in eval mode while the prepared ones of `layers` watch."""
    batches: Iterable[tuple[tuple, dict]] = calls(data, "quantize_: data", model)
    schemes = [layer.scheme for layer in layers if layer.scheme is not None]
    passes = max(scheme.calibration_passes for scheme in schemes if scheme.needs_data)
    if passes > 1:
        batches = list(batches)  # they may come from a generator
    watched = [layer.module for layer in layers if layer.scheme is not None]
    for _ in range(passes):
        with torch.no_grad(), evaluating(model), _watching(model, watched):
            for args, kwargs in with_bar(batches, "calibrating", "batch", progress):
                model(*args, **kwargs)


@contextmanager
def _watching(model: nn.Module, layers: list[PreparedLinear]) -> Iterator[None]:
    before = [layer.is_calibrating for layer in layers]
    for layer in layers:
        layer.is_calibrating = True
    try:
        with smoothing(model, layers):
            yield
    finally:
        for layer, was_calibrating in zip(layers, before, strict=True):
            layer.is_calibrating = was_calibrating
            layer.take_input_qparams_()


def require_ready(layers: list[Layer]) -> None:
    """Raises ValueError for the first prepared layer that cannot be frozen."""
    for layer in layers:
        if layer.scheme is not None:
            if layer.module.is_calibrating:
                raise ValueError(
                    "freeze_: calibration is not over; leave the `with octavo.calibrating(model):` block"
                )
            layer.module.name = layer.name
            layer.module.require_calibrated()
            require_finite(layer)
            layer.module.fake_quantized_bias()  # raises if it cannot become what it shall


def freeze_layers(model: nn.Module, layers: list[Layer], progress: bool) -> nn.Module:
    """Puts an integer layer in the place of each prepared one; returns the model, or what a bare layer became.

    Each float weight is dropped before the next layer is frozen, so the peak is the model plus one layer.
    """
    places = places_of((layer.module for layer in layers), model)
    for layer in with_bar(layers, "quantizing", "layer", progress):
        if layer.scheme is not None:
            at = places[id(layer.module)]
            with torch.inference_mode(False), torch.no_grad():
                frozen = layer.scheme.freeze(layer.module)
            if layer.module is model:
                model = frozen
            layer.becomes(frozen, "quantized")
            replace_at(at, frozen)
    set_quantization_config(model)
    return model


def require_module(who: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")


def require_root(who: str, model: object, kind: type[nn.Module], remedy: str) -> None:
    """Raises TypeError for what is no module, ValueError for one that is itself what should be replaced."""
    require_module(who, model)
    if isinstance(model, kind):
        raise ValueError(
            f"{who}: the model itself is of the kind {kind.__name__}, which cannot be replaced in place; {remedy}"
        )
