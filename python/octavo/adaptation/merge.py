# SPDX-License-Identifier: Apache-2.0
"""Merges adapters into the layers that they hang on, and measures what rounding leaves of them.

A merged weight is rounded to the codes of its format anew, and small changes can vanish in that: the receipt says how
much was kept. Where an adapter only multiplies outputs, and scales are float32 for each row, nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base.batches import calls, evaluating, float_tensors, output_of
from ..base.modules import places_of, replace_at, undone_on_error
from ..metrics import kld
from ..nn import OutlierLinear, QuantLinear, SmoothedLinear
from ..nn.adapters import AdaptedLinear, IA3Layer
from ..nn.adapters.base import bias_values
from ..nn.replacements import matrix_of, weight_of, with_tensors
from .adapt import adapted_layers, adapter_layers, remove_adapters_
from .receipt import MergedRow, MergeReceipt


def merge_(
    model: nn.Module, name: str | None = None, *, min_survival: float = 0.5, data: Any = None
) -> MergeReceipt:
    """Merges the adapter `name`, or all that count now, into the layers, in place; then the model has no adapters.

    min_survival   the least share of the change that must be in the rounded weights; 0.0 takes everything
    data           batches as `octavo.compare` takes them, for the KL divergences of the receipt: of the softmax over
                   the last axis of the first float tensor of the output
    returns        MergeReceipt
    raises         ValueError if less survives, with the remedies, for layers with outlier columns, for a name that the
                   model has not, and if no adapter counts. The model is then unchanged
    Peak memory: the packed layers twice, and one float weight.
    source         docs/numerics.md, eq. 129
    """
    adapted = adapted_layers(model)
    if name is not None:
        adapter_layers("merge_", model, name)
    strengths = {layer: layer.active if name is None else _only(layer, name) for layer in adapted.values()}
    if not any(strengths.values()):
        raise ValueError(
            "merge_: no adapter counts in this model; octavo.use_adapters(model, name) switches to one"
        )
    wanted = None if data is None else _outputs(model, data, strengths)
    rows, merged = [], {}
    with torch.no_grad():
        for each, layer in adapted.items():
            if strengths[layer]:
                merged[layer], row = _merge_layer(each, layer, strengths[layer])
                rows.append(row)
    receipt = MergeReceipt(rows)
    if not receipt.survival >= min_survival:
        raise ValueError(_refusal(receipt, min_survival))
    divergences = None if wanted is None else _divergences(model, data, wanted, merged)
    with undone_on_error(model):
        places = places_of(merged, model)
        for layer, new in merged.items():
            replace_at(places[id(layer)], new)
    remove_adapters_(model)
    return receipt if divergences is None else MergeReceipt(rows, *divergences)


def _only(layer: AdaptedLinear, name: str) -> dict[str, float]:
    return {name: layer.active.get(name, 1.0)} if name in layer.adapters else {}


def _refusal(receipt: MergeReceipt, least: float) -> str:
    worst = sorted((row for row in receipt.rows if row.change), key=lambda row: row.survival)[:3]
    named = ", ".join(f"{row.name} {row.survival:.1%}" for row in worst)
    return (
        f"merge_: {receipt.survival:.1%} of the adapter would survive the rounding, {least:.1%} are wanted (least: "
        f"{named}). Keep the adapter beside the layers; or merge it into the float model, octavo.load_adapter and "
        "merge_ there, and quantize that, best with a method that looks at data; or quantize with more bits or smaller "
        "groups; or take the loss with min_survival=0.0"
    )


# --- one layer ------------------------------------------------------------------------------------------------------


def _merge_layer(name: str, layer: AdaptedLinear, active: dict[str, float]) -> tuple[nn.Module, MergedRow]:
    base: Any = layer.base
    if isinstance(base, OutlierLinear):
        raise ValueError(
            f"merge_: {name!r} keeps outlier columns apart, into which nothing is merged; keep the adapter beside it"
        )
    before = base.dequantize() if isinstance(base, QuantLinear) else matrix_of(base).detach().float()
    weight, bias = _merged_tensors(layer, active, before)
    new: Any = None
    exact = _exactly_scaled(layer, active)
    if exact is not None:
        new, how = exact, "exact"
    elif isinstance(base, QuantLinear):
        new, how = requantized(base, weight, bias), "requantized"
    else:
        dtype = base.weight.dtype
        new = with_tensors(base, weight_of(base, weight.to(dtype)), None if bias is None else bias.to(dtype))
        how = "float"
    after = new.dequantize() if isinstance(new, QuantLinear) else matrix_of(new).detach().float()
    change = (weight - before).double()
    row = MergedRow(
        name,
        base.scheme.name if isinstance(base, QuantLinear) else "float",
        how,
        float(change.square().sum()),
        float(before.double().square().sum()),
        float(((after - before).double() * change).sum()),
    )
    return new, row


def _merged_tensors(
    layer: AdaptedLinear, active: dict[str, float], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The float weight and bias with which the layer needs no adapters."""
    adapters: list[tuple[Any, float]] = [
        (layer.adapters[name], strength) for name, strength in active.items()
    ]
    bias = bias_values(layer.base)
    bias = None if bias is None else bias.float()
    for adapter, strength in adapters:
        weight = adapter.merged_input(weight, strength)
    for adapter, strength in adapters:
        weight = adapter.merged(weight, strength, layer.base)
        bias = adapter.merged_bias(bias, strength, layer.base)
    if not weight.isfinite().all():
        raise ValueError(
            "merge_: the merged weight holds NaN or Inf: the training of the adapter has diverged"
        )
    return weight, bias


def requantized(base: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> QuantLinear:
    """A layer like `base` with the nearest codes of `weight`, and with what calibration has found for `base`."""
    weights = base.scheme.weights
    if isinstance(base, SmoothedLinear):
        weight = weight / base.input_multiplier.detach()
    tensors = weights.store(weights.stored_qparams(weights.qparams(weight)).quantize(weight))
    return _like(base, tensors, bias)


def _like(base: Any, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> QuantLinear:
    own = bias_values(base)
    if bias is not None and own is not None and own.dtype in (torch.bfloat16, torch.float16):
        bias = bias.to(own.dtype)
    shape = base.out_features, base.in_features
    new = type(base).from_tensors(tensors, bias, base.scheme, shape=shape)
    new.weight_dtype, new.replaces, new.activation = base.weight_dtype, base.replaces, base.activation
    new.train(base.training).pack_()
    base.scheme.activations.finish_(new, base)
    if isinstance(base, SmoothedLinear):
        new.set_input_multiplier_(base.input_multiplier.detach().clone())
    return new


def _exactly_scaled(layer: AdaptedLinear, active: dict[str, float]) -> QuantLinear | None:
    """The layer with scales and bias multiplied by factors of outputs, where that is all that the adapters do and the
    format can hold it; else None."""
    base: Any = layer.base
    adapters: list[Any] = [layer.adapters[name] for name in active]
    if not isinstance(base, QuantLinear) or not all(
        isinstance(adapter, IA3Layer) and not adapter.is_input for adapter in adapters
    ):
        return None
    factors = torch.ones(base.out_features)
    bias = bias_values(base)
    bias = None if bias is None else bias.float()
    for adapter, strength in zip(adapters, active.values(), strict=True):
        factors = adapter.merged(factors[:, None], strength, base)[:, 0]
        bias = adapter.merged_bias(bias, strength, base)
    tensors = base.scheme.weights.scaled_rows(base.canonical_tensors(), factors)
    return None if tensors is None else _like(base, tensors, bias)


# --- the whole model ------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, data: Any, strengths: Any) -> list[torch.Tensor]:
    """What the model gives for each batch with the adapters of `strengths`."""
    before = {layer: layer.active for layer in strengths}
    try:
        for layer, active in strengths.items():
            layer.active = dict(active)
        return _run(model, data)
    finally:
        for layer, active in before.items():
            layer.active = active


def _run(model: nn.Module, data: Any) -> list[torch.Tensor]:
    with torch.no_grad(), evaluating(model):
        return [
            next(iter(float_tensors(output_of(model, args, kwargs)))).clone()
            for args, kwargs in calls(data, "merge_: data", model)
        ]


def _divergences(
    model: nn.Module, data: Any, wanted: list[torch.Tensor], merged: dict[AdaptedLinear, nn.Module]
) -> tuple[float, float]:
    """Mean KL divergence from `wanted` to the model without adapters, and to the model with the layers `merged`."""
    without = _outputs(model, data, {layer: {} for layer in adapted_layers(model).values()})
    places = places_of(merged, model)
    try:
        for layer, new in merged.items():
            replace_at(places[id(layer)], new)
        after = _run(model, data)
    finally:
        for layer in merged:
            replace_at(places[id(layer)], layer)
    return _mean_kld(wanted, without), _mean_kld(wanted, after)


def _mean_kld(references: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    pairs = zip(references, outputs, strict=True)
    return float(torch.cat([kld(reference, output).flatten() for reference, output in pairs]).mean())
