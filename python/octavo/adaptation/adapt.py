# SPDX-License-Identifier: Apache-2.0
"""Puts adapters on the layers of a model and takes them off again; tells which of them count.

An adapted layer is an AdaptedLinear in the place of the layer, which it holds. Everything else of the model is frozen
while it has adapters, and as trainable as before when the last one is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..base import configs
from ..base.modules import places_of, replace_at, undone_on_error
from ..base.patterns import matches, require_match
from ..nn import PreparedLinear, QuantLinear
from ..nn.adapters import AdaptedLinear, Adapter, LayerAdapter, LoRA
from ..nn.adapters.base import bias_values
from ..nn.replacements import has_other_forward, replacement_of
from .report import AdaptedRow, AdapterReport

EXAMPLES = "octavo.LoRA(r=8), octavo.AdaLoRA(total_step=1000), octavo.IA3() and their classes"
FUSED = "octavo.nn.fused."
TRAINABLE = "_trainable_without_adapters"  # of the model: names of the Parameters that were trainable before

Layers = dict[nn.Module, list[str]]  # linear layers in the model's order, and all names that each goes by


def adapt_(model: nn.Module, adapter: Adapter | type[Adapter], name: str = "default") -> AdapterReport:
    """Puts `adapter` on the linear layers that it targets, in place, and freezes everything else.

    adapter   octavo.LoRA(...), octavo.AdaLoRA(...), octavo.IA3(...) or one of these classes
    name      by which `use_adapters`, `save_adapter` and the others know it; a model may have several
    returns   AdapterReport, one row for each linear layer
    The new adapter is the one that counts from now on, and changes no output before it is trained. What is trained are
    `octavo.adapters(model)`; quantized layers stay packed. A layer in several places has one adapter for all.
    raises    TypeError for another adapter; ValueError for a name that is taken or is none, for patterns that match no
              layer, for a model without quantized layers if `targets` is None, for prepared, fused and empty layers,
              and if the model is itself a linear layer. The model is then unchanged
    """
    adapter = configs.instance("adapt_: adapter", Adapter, adapter, EXAMPLES)
    layers = linear_layers("adapt_", model)
    require_free("adapt_", model, name)
    made = new_layers(adapter, layers)
    with undone_on_error(model):
        attach(model, name, adapter, made)
    return adapter_report(name, adapter, layers, made)


def remove_adapters_(model: nn.Module, name: str | None = None) -> None:
    """Takes the adapter `name`, or all of them, off the model, in place.

    Without the last one, the model is what it was before the first one: the same layers, trainable as before.
    raises   ValueError for a name that the model has not
    """
    if name is not None:
        adapter_layers("remove_adapters_", model, name)
    adapted = adapted_layers(model)
    places = places_of(adapted.values(), model)
    for layer in adapted.values():
        for each in [name] if name is not None else list(layer.adapters):
            layer.remove_(each)
        if not len(layer.adapters):
            replace_at(places[id(layer)], layer.base)
    if not adapted_layers(model):
        _restore_trainable(model)


class UsedAdapters:
    """What `use_adapters` returns: as a context manager it goes back to what counted before."""

    def __init__(self, before: dict[AdaptedLinear, dict[str, float]]):
        self._before = before

    def __enter__(self) -> UsedAdapters:
        return self

    def __exit__(self, *error: Any) -> None:
        for layer, active in self._before.items():
            layer.active = {name: strength for name, strength in active.items() if name in layer.adapters}


def use_adapters(model: nn.Module, names: str | Mapping[str, float] | None) -> UsedAdapters:
    """From now on these adapters count, and no others.

    names     one name, {name: strength} for several, which are applied in this order, or None: the model computes what
              it would without adapters. 1.0 is the strength that was trained, 0.5 half of the effect
    returns   an object for `with`, after which everything is as before: `with octavo.use_adapters(model, None): ...`
    raises    ValueError for a name that the model has not; TypeError for what is no number. Nothing is changed then
    """
    chosen = {} if names is None else {names: 1.0} if isinstance(names, str) else dict(names)
    for name, strength in chosen.items():
        adapter_layers("use_adapters", model, name)
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise TypeError(f"use_adapters: the strength of {name!r} must be a number, got {strength!r}")
    before = {}
    for layer in adapted_layers(model).values():
        before[layer] = layer.active
        layer.active = {name: float(value) for name, value in chosen.items() if name in layer.adapters}
    return UsedAdapters(before)


def adapters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The Parameters of the adapter `name`, or of all that count now: what an optimizer is given.

    raises   ValueError for a name that the model has not, and for a model without adapters that count
    """
    if name is not None:
        adapter_layers("adapters", model, name)
    found = [
        parameter
        for layer in adapted_layers(model).values()
        for each in ([name] if name is not None else layer.active)
        if each in layer.adapters
        for parameter in layer.adapters[each].parameters()
    ]
    if not found:
        raise ValueError(
            "adapters: no adapter counts in this model; octavo.adapt_(model, octavo.LoRA()) puts one on, and "
            "octavo.use_adapters(model, name) switches to one"
        )
    return found


# --- for this room --------------------------------------------------------------------------------------------------


def linear_layers(who: str, model: nn.Module) -> Layers:
    """The linear layers of `model`, quantized, float, prepared or adapted, each with its names. Raises as `adapt_`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is {type(model).__name__}, a torch.nn.Module is needed")
    if _is_linear_layer(model):
        raise ValueError(
            f"{who}: the model is itself a linear layer, which cannot be replaced in place; put it into a "
            "torch.nn.Sequential"
        )
    layers: Layers = {}
    for name, layer in _walk(who, model, ""):
        layers.setdefault(layer, []).append(name)
    return layers


def layer_base(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, AdaptedLinear) else layer


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """By name, the first one of those that a layer goes by."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def adapter_layers(who: str, model: nn.Module, name: str) -> tuple[Adapter, dict[str, Any]]:
    """The adapter called `name`, and its modules by the names of their layers. Raises ValueError if there is none."""
    adapted = adapted_layers(model)
    found = {each: layer.adapters[name] for each, layer in adapted.items() if name in layer.adapters}
    if not found:
        known = list(dict.fromkeys(each for layer in adapted.values() for each in layer.adapters))
        there = f"it has {', '.join(map(repr, known))}" if known else "it has none; octavo.adapt_ puts one on"
        raise ValueError(f"{who}: the model has no adapter {name!r}; {there}")
    return adapted[next(iter(found))].configs[name], found


def require_free(who: str, model: nn.Module, name: str) -> None:
    """Raises TypeError, ValueError if `name` cannot become the name of an adapter of `model`."""
    if not isinstance(name, str):
        raise TypeError(f"{who}: name must be a string, got {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{who}: {name!r} cannot be the name of an adapter; use letters, such as 'french'")
    if any(name in layer.adapters for layer in adapted_layers(model).values()):
        raise ValueError(
            f"{who}: the model has an adapter {name!r} already; give another name, or take that one off with "
            f"octavo.remove_adapters_(model, {name!r})"
        )


def new_layers(adapter: Adapter, layers: Layers) -> dict[nn.Module, LayerAdapter]:
    """What `adapter` becomes at each linear layer that it concerns. Raises as `adapt_`."""
    made = {}
    for layer in _targets(adapter, layers):
        made[layer] = adapter.layer(layers[layer][0], layer_base(layer))
    if isinstance(adapter, LoRA) and adapter.adapts_biases_elsewhere:
        for layer, names in layers.items():
            if layer not in made and bias_values(layer_base(layer)) is not None:
                _require_adaptable(names[0], layer)
                made[layer] = adapter.bias_layer(layer_base(layer))
    return made


def attach(model: nn.Module, name: str, adapter: Adapter, made: Mapping[nn.Module, LayerAdapter]) -> None:
    """Hangs `made`, new modules by their layers, on the layers, as the only ones that count, and freezes the rest."""
    for each in adapted_layers(model).values():
        each.active = {}
    places = places_of(made, model)
    for layer, own in made.items():
        adapted = layer if isinstance(layer, AdaptedLinear) else AdaptedLinear(layer)
        adapted.add_(name, adapter, own)
        if adapted is not layer:
            replace_at(places[id(layer)], adapted)
    _freeze(model)


def adapter_report(
    name: str, adapter: Adapter, layers: Layers, made: Mapping[nn.Module, LayerAdapter]
) -> AdapterReport:
    rows = [_row(names[0], layer, made.get(layer)) for layer, names in layers.items()]
    return AdapterReport(configs.label(replace(adapter, targets=None)), name, rows)


# --- details --------------------------------------------------------------------------------------------------------


def _walk(who: str, module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for own, child in module._modules.items():
        name = f"{prefix}{own}"
        if child is None:
            continue
        if type(child).__module__.startswith(FUSED):
            raise ValueError(
                f"{who}: {name!r} is fused, and fused parts do not call the layers in them; octavo.unfuse_(model) first"
            )
        if _is_linear_layer(child):
            yield name, child
        else:
            yield from _walk(who, child, f"{name}.")


def _is_linear_layer(module: nn.Module) -> bool:
    if isinstance(module, AdaptedLinear | QuantLinear | PreparedLinear):
        return True
    entry = replacement_of(module)
    return entry is not None and not entry.unserved and not has_other_forward(module)


def _targets(adapter: Adapter, layers: Layers) -> list[nn.Module]:
    if adapter.targets is None:
        found = [layer for layer in layers if isinstance(layer_base(layer), QuantLinear)]
        if not found:
            raise ValueError(
                "adapt_: the model has no quantized layers; quantize it first, octavo.quantize_(model, octavo.NF4()), "
                f"or name layers that shall stay float: octavo.{adapter.name}(targets=[...])"
            )
    else:
        everything = [name for names in layers.values() for name in names]
        for pattern in adapter.targets:
            require_match("adapt_: targets", pattern, everything)
        found = [
            layer
            for layer, names in layers.items()
            if any(matches(pattern, names) for pattern in adapter.targets)
        ]
    for layer in found:
        _require_adaptable(layers[layer][0], layer)
    return found


def _require_adaptable(name: str, layer: nn.Module) -> None:
    base = layer_base(layer)
    if isinstance(base, PreparedLinear):
        raise ValueError(
            f"adapt_: {name!r} is prepared, its float weight is still trained; octavo.freeze_(model) first"
        )
    if getattr(base, "activation", None) is not None:
        raise ValueError(
            f"adapt_: {name!r} computes its activation function as well, behind which an adapter would come too late; "
            "octavo.unfuse_(model) first"
        )
    if any(tensor is not None and tensor.is_meta for tensor in (*base.parameters(), *base.buffers())):
        raise ValueError(f"adapt_: {name!r} is on the meta device and has no values; load the model first")


def _freeze(model: nn.Module) -> None:
    """Freezes all that is no adapter, and notes what was trainable, once."""
    trained = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    others = {name: p for name, p in model.named_parameters() if id(p) not in trained}
    if not hasattr(model, TRAINABLE):
        names = tuple(name.replace(".base.", ".") for name, p in others.items() if p.requires_grad)
        setattr(model, TRAINABLE, names)
    for parameter in others.values():
        parameter.requires_grad_(False)


def _restore_trainable(model: nn.Module) -> None:
    for module in model.modules():
        names = module.__dict__.pop(TRAINABLE, ())
        known = dict(module.named_parameters()) if names else {}
        for name in names:
            if name in known:
                known[name].requires_grad_(True)


def _row(name: str, layer: nn.Module, own: LayerAdapter | None) -> AdaptedRow:
    base = layer_base(layer)
    tensors = [*base.parameters(), *(buffer for buffer in base.buffers() if buffer is not None)]
    size = sum(tensor.nbytes for tensor in tensors)
    kind = type(base).__name__
    if own is None:
        is_quantized = isinstance(base, QuantLinear)
        reason = "no target" if is_quantized else "float, and no target"
        return AdaptedRow(name, kind, "kept", reason, 0, size)
    count = sum(parameter.numel() for parameter in own.parameters())
    return AdaptedRow(name, kind, "adapted", own.summary(), count, size)
