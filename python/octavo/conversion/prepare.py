# SPDX-License-Identifier: Apache-2.0
"""The way to integers in steps: prepare_, then calibrate and train as long as you like, then freeze_.

A prepared layer still has its float weight and computes what the frozen one will (nn/prepared.py). Each step looks at
everything before it changes anything, and may be followed by saving and loading.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..base.batches import calls, evaluating
from ..base.distributed import require_unwrapped
from ..base.modules import Places, Undo, places_of, replace_at, undone_on_error
from ..base.progress import with_bar
from ..files import model_changed
from ..methods.statistics import Positions
from ..nn import PreparedLinear, QuantLinear, leave_fused_paths
from ..nn.experts import experts_as_layers
from ..nn.replacements import embedding_of, replacement_of
from ..schemes import Scheme
from .plan import Layer, plan_freezing, plan_quantization, report_of, require_finite
from .report import QuantizationReport
from .selection import Embeddings, LayerFilter, Patterns, SchemeLike, Selection
from .sequence import BlockSequence

_log = logging.getLogger("octavo")

NAMED = 8  # layers in one message
ATTEMPTS = 3  # to freeze a layer, once there is no way back


def prepare_(
    model: nn.Module,
    scheme: SchemeLike | Mapping[str, SchemeLike | None] | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: LayerFilter | None = None,
    include_embeddings: Embeddings = False,
    estimator: str = "clipped",
    learn_scales: bool = False,
) -> QuantizationReport:
    """Replaces the linear layers of `model`, in place, by PreparedLinear ones that hold the same Parameters.

    scheme, include, exclude, filter_fn, include_embeddings   as in `quantize_`
    estimator      the gradient of rounding while training: "clipped" is 0 for values out of range, "pure" 1 everywhere
    learn_scales   train the scales and zero points, too: they become Parameters, so make the optimizer after this call
    returns        QuantizationReport, whose rows say "prepared" or "kept"
    raises         as `quantize_`; ValueError for another estimator, and for learned scales if the model is wrapped for
                   several processes already. The model is then unchanged
    """
    require_root("prepare_", model, is_replaced, "wrap it: nn.Sequential(layer)")
    if learn_scales:
        require_unwrapped("prepare_", model, "scales of its own, which no process tells the others")
    selection = Selection(scheme, include, exclude, filter_fn, include_embeddings)
    with undone_on_error(model), experts_as_layers(model):
        layers = plan_quantization(model, selection)
        prepare_layers(model, layers, estimator=estimator, learn_scales=learn_scales)
    return report_of(layers)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, prepared layers are float layers whose observers watch; on leaving, their input scales are set.

    Several blocks add up: what was seen before still counts. SmoothQuant chooses its smoothing on leaving the first one
    and folds it into norms and linear layers; with Int8Static it needs a second one, over the same data. Training mode
    is left as it is: call model.eval() first if there is dropout, and torch.no_grad() saves memory.
    raises   ValueError if the model has no prepared layers, and if DistributedDataParallel or FSDP holds it in several
             processes, which would find different scales: calibrate, then wrap; TypeError if it is no module
    """
    require_module("calibrating", model)
    layers = [module for module in model.modules() if isinstance(module, PreparedLinear)]
    if not layers:
        raise ValueError(
            "calibrating: the model has no prepared layers; call octavo.prepare_(model, scheme) first"
        )
    require_unwrapped("calibrating", model, "ranges of its own, from its own batches")
    with _watching(model, layers):
        yield


def freeze_(model: nn.Module, *, progress: bool = False) -> QuantizationReport:
    """Replaces the prepared layers of `model`, in place, by integer layers with the codes that they have now.

    Nothing is trained after that: weights are codes and scales are frozen. A second call does nothing.
    progress   a tqdm bar over the layers
    returns    QuantizationReport
    raises     ValueError for layers that are not calibrated, for NaN or Inf in a weight, for a scale that is NaN, Inf
               or 0 (of a negative one the absolute value counts, as in training), inside `calibrating`, and if the
               model is itself a prepared layer; TypeError if it is no module. The model is then unchanged. An interrupt
               that comes when float weights are gone already is raised when all layers are frozen
    """
    require_root("freeze_", model, _is_prepared, "use layer = layer.scheme.freeze(layer)")
    layers = plan_freezing(model)
    require_ready(layers)
    with undone_on_error(model) as undo:
        freeze_layers(model, layers, progress, undo)
    return report_of(layers)


# --- the steps, for quantize_ as well -------------------------------------------------------------------------------


def prepare_layers(model: nn.Module, layers: list[Layer], **options: Any) -> None:
    """Puts a prepared layer in the place of each layer that has a scheme."""
    places = places_of((layer.module for layer in layers), model)
    for layer in layers:
        if layer.scheme is not None:
            at = places[id(layer.module)]
            prepared = prepare_layer(layer, **options)
            if layer.shares is not None:
                prepared.share_scales_(layer.shares.module)
            replace_at(at, prepared)
    leave_fused_paths(model)


def prepare_layer(layer: Layer, **options: Any) -> PreparedLinear:
    """Makes the prepared form of one layer, and notes it in the plan instead of the float layer."""
    assert layer.scheme is not None
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be saved for backward
        prepared = layer.scheme.prepare_linear(layer.module, **options)
    prepared.name = layer.name
    layer.becomes(prepared, "prepared")
    return prepared


def calibrate(model: nn.Module, layers: list[Layer], data: Any, progress: bool) -> None:
    """Runs the batches of `data` through the model in eval mode while the prepared ones of `layers` watch."""
    require_unwrapped("quantize_", model, "ranges of its own, from its own batches")
    batches: Iterable[tuple[tuple, dict]] = calls(data, "quantize_: data", model)
    schemes = [layer.scheme for layer in layers if layer.scheme is not None and layer.needs_data]
    passes = max(scheme.calibration_passes for scheme in schemes)
    if passes > 1:
        batches = list(batches)  # they may come from a generator
    watched = [layer.module for layer in layers if layer.scheme is not None]
    for _ in range(passes):
        # Until they are frozen the layers hold the Parameters of the float model, which must not change.
        with torch.no_grad(), evaluating(model), _watching(model, watched, in_place=False):
            for args, kwargs in with_bar(batches, "calibrating", "batch", progress):
                model(*args, **kwargs)


def quantize_in_sequence(model: nn.Module, layers: list[Layer], data: Any, progress: bool) -> None:
    """Calibrates and freezes the layers block by block. The float weights are there until the last one is frozen.

    raises   ValueError if data is empty, and as `require_ready`
    """
    require_unwrapped("quantize_", model, "ranges of its own, from its own batches")
    batches = list(calls(data, "quantize_: data", model))
    if not batches:
        raise ValueError("quantize_: data is empty; give at least one batch")
    of = {layer.module: layer for layer in layers if layer.scheme is not None}
    places = places_of(of, model)
    for layer in layers:  # what an embedding reads has no range, and a tied head needs the embedding's codes
        if layer.is_embedding or layer.shares is not None:
            _freeze_layer(layer, places, None)
    with torch.no_grad(), evaluating(model):
        sequence = BlockSequence(model, batches)
        for part in with_bar(sequence, "quantizing", "block", progress):
            own = [of[module] for module in part.layers]
            for _ in range(max(layer.scheme.calibration_passes for layer in own if layer.scheme)):
                positions = sequence.positions
                with _watching(part.root, part.layers, in_place=False, positions=positions):
                    part.run(positions)
            require_ready(own)
            for layer in own:
                _freeze_layer(layer, places, None)
    model_changed(model)


@contextmanager
def _watching(
    model: nn.Module,
    layers: list[PreparedLinear],
    *,
    in_place: bool = True,
    positions: Positions | None = None,
) -> Iterator[None]:
    before = [layer.is_calibrating for layer in layers]
    for layer in layers:
        layer.is_calibrating = True
    try:
        with ExitStack() as stack:
            for method in dict.fromkeys(type(layer.scheme.method) for layer in layers):
                own = [layer for layer in layers if type(layer.scheme.method) is method]
                stack.enter_context(method.watching(model, own, in_place=in_place, positions=positions))
            yield
    finally:
        # Inference tensors could take no part in training later.
        with torch.inference_mode(False), torch.no_grad():
            for layer, was_calibrating in zip(layers, before, strict=True):
                layer.is_calibrating = was_calibrating
                layer.take_input_qparams_()


def require_ready(layers: list[Layer]) -> None:
    """Raises ValueError, before anything is changed, if a prepared layer cannot be frozen."""
    prepared = [layer for layer in layers if layer.scheme is not None]
    for layer in prepared:
        if layer.module.is_calibrating:
            raise ValueError(
                "freeze_: calibration is not over; leave the `with octavo.calibrating(model):` block"
            )
        layer.module.name = layer.name
    _require_calibrated([layer.module for layer in prepared])
    with torch.no_grad():
        for layer in prepared:
            require_finite(layer)
            layer.module.scheme.method.require_ready(layer.module)
            layer.module.require_scales()
            if type(layer.module).float_weight is not PreparedLinear.float_weight:
                _ = layer.module.weight_qparams  # raises if what becomes codes is not finite
            layer.module.fake_quantized_bias()  # raises if it cannot become what it shall


def _require_calibrated(layers: list[PreparedLinear]) -> None:
    """Raises ValueError with the names of the layers that are not calibrated, if there are any."""
    missing = [layer for layer in layers if not layer.is_calibrated]
    try:
        for layer in missing:
            layer.require_calibrated()
    except ValueError as error:
        if len(missing) == 1:
            raise
        names = ", ".join(repr(layer.name) for layer in missing[:NAMED])
        others = f" and {len(missing) - NAMED} others" if len(missing) > NAMED else ""
        raise ValueError(
            f"{len(missing)} of {len(layers)} layers are not calibrated: {names}{others}. Of the first: {error}"
        ) from None


def freeze_layers(
    model: nn.Module,
    layers: list[Layer],
    progress: bool,
    undo: Undo | None = None,
    originals: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """Puts an integer layer in the place of each prepared one; returns the model, or what a bare layer became.

    Each float weight is dropped before the next layer is frozen, so the peak is the model plus one layer. With `undo`,
    which is let go before the first weight is dropped, an exception before that leaves everything to it. A later one,
    a KeyboardInterrupt or a MemoryError, is raised when all other layers are frozen, so that the model is of one kind.
    originals   what a Layer, by its id, was before it was prepared: is put back where three attempts to freeze fail
    """
    todo = deque(layer for layer in layers if layer.scheme is not None)
    originals = {} if originals is None else originals
    root = next((layer for layer in todo if layer.module is model), None)
    places = places_of((layer.module for layer in todo), model)
    bar = iter(with_bar(list(todo), "quantizing", "layer", progress))
    attempts = 0
    first_error: BaseException | None = None
    while todo:
        layer = todo[0]
        try:
            if attempts == 0:
                next(bar, None)
            attempts += 1
            _freeze_layer(layer, places, undo)
        except BaseException as error:
            if undo is None or undo.is_possible:
                raise
            first_error = error if first_error is None else first_error
            if attempts < ATTEMPTS:
                continue
            if isinstance(layer.module, PreparedLinear):
                replace_at(places[id(layer.module)], originals.get(id(layer), layer.module))
        originals.pop(id(layer), None)
        todo.popleft()
        attempts = 0
    next(bar, None)  # which ends it
    model_changed(model)
    if first_error is not None:
        _log.warning("the conversion was interrupted when float weights were gone, and has been completed")
        raise first_error
    return model if root is None else root.module


def _freeze_layer(layer: Layer, places: Places, undo: Undo | None) -> None:
    """Attempts once to freeze a layer. An attempt before may have been interrupted at any point."""
    module, remark = layer.module, layer.row.reason
    if isinstance(module, PreparedLinear):
        at, prepared = places[id(module)], module
        with torch.inference_mode(False), torch.no_grad():
            leader: Any = None if layer.shares is None else layer.shares.module
            shares = leader if isinstance(leader, QuantLinear) else None
            module = layer.scheme.freeze(prepared, shares)  # type: ignore[union-attr]
        remark = prepared.remark
        if undo is not None:
            undo.let_go()
        replace_at(at, module)
    layer.becomes(module, "quantized", remark)


def require_module(who: str, model: object) -> None:
    if isinstance(model, Scheme) or (isinstance(model, type) and issubclass(model, Scheme)):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got a scheme; the model comes first")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")


def require_root(who: str, model: Any, is_layer: Callable[[Any], object], remedy: str) -> None:
    """Raises TypeError for what is no module, ValueError for one that is itself what should be replaced."""
    require_module(who, model)
    if is_layer(model):
        raise ValueError(
            f"{who}: the model itself is of the kind {type(model).__name__}, which cannot be replaced in place; "
            f"{remedy}"
        )


def is_replaced(module: nn.Module) -> bool:
    """Whether `module` is a float layer that could be replaced by one of ours."""
    return replacement_of(module) is not None or embedding_of(module) is not None


def _is_prepared(module: nn.Module) -> bool:
    return isinstance(module, PreparedLinear)
