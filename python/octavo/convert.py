# SPDX-License-Identifier: Apache-2.0
"""Replaces the linear layers of a model by quantized ones and reports on every layer.

Everything is looked at before anything is changed, so that bad input leaves the model as it was. Then each float weight
is dropped before the next layer is quantized: in place the peak is the model plus one layer.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .malloc import give_back
from .matching import LayerFilter, Patterns, SchemeLike, Selection
from .nn import QuantLinear, leave_fused_paths
from .report import QuantizationReport, Row
from .schemes import Scheme

_log = logging.getLogger("octavo")


def quantize_(
    model: nn.Module,
    scheme: SchemeLike | Mapping[str, SchemeLike | None],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: LayerFilter | None = None,
    progress: bool = False,
) -> QuantizationReport:
    """Quantizes the nn.Linear layers of `model` in place and reports on every module with weights.

    scheme             a scheme, its class, or {pattern: scheme or None}: the first match decides, None keeps float
    include, exclude   patterns of layer names: fnmatch, or a regular expression after "re:"
    filter_fn          filter_fn(module, name) -> bool, asked for each nn.Linear that the patterns let through
    progress           a tqdm bar over the layers
    returns            QuantizationReport. Kept float, with the reason: tied weights, parametrized layers, layers with
                       hooks, subclasses with a forward of their own, and what the scheme cannot serve
    raises             ValueError for NaN or Inf in a weight, for a pattern that matches nothing, and if the model is
                       itself an nn.Linear; TypeError for other arguments. The model is then unchanged
    """
    _require_module("quantize_", model)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "quantize_: the model is itself an nn.Linear, which cannot be replaced in place; "
            "use layer = octavo.quantized(layer, scheme)"
        )
    layers = _plan(model, Selection(scheme, include, exclude, filter_fn))
    slots = _slots(model)
    for layer in _with_progress(layers, progress):
        if layer.scheme is not None:
            places = slots[id(layer.module)]
            new = layer.quantize(layer.scheme)
            for parent, attribute in places:
                parent._modules[attribute] = new
    give_back()  # else the process stays as large as with the float weights: 540 MB for 134 MB of codes
    leave_fused_paths(model)
    return _report(layers)


def quantized(
    model: nn.Module,
    scheme: SchemeLike | Mapping[str, SchemeLike | None],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: LayerFilter | None = None,
    progress: bool = False,
) -> nn.Module:
    """A quantized copy of `model`, which stays untouched; the arguments are those of `quantize_`.

    The weights that are quantized are never copied as floats. `model` may be a bare nn.Linear.
    """
    _require_module("quantized", model)
    layers = _plan(model, Selection(scheme, include, exclude, filter_fn))
    copies: dict[int, object] = {}  # deepcopy's memo: what it finds here, it takes for copied already
    for layer in _with_progress(layers, progress):
        if layer.scheme is not None:
            key = id(layer.module)
            copies[key] = layer.quantize(layer.scheme)
    result = copy.deepcopy(model, copies)
    give_back()
    leave_fused_paths(result)
    _report(layers)
    return result


@dataclass
class _Layer:
    """A module with weights, by all its names, and what is to be done with it; a scheme means: quantize."""

    names: list[str]
    module: Any  # None once it is quantized
    scheme: Scheme | None
    row: Row

    def quantize(self, scheme: Scheme) -> QuantLinear:
        # Inference tensors could not be saved for backward.
        with torch.inference_mode(False), torch.no_grad():
            new = scheme.quantize_linear(self.module)
        self.module = None  # the caller drops the other references, and the float weight is gone
        self.row = replace(self.row, action="quantized", scheme=scheme.name, bytes_after=_bytes(new, set()))
        return new

    def rows(self) -> list[Row]:
        reason = f"the same module as {self.names[0]!r}"
        alias = replace(self.row, reason=reason, bytes_before=0, bytes_after=0)
        return [self.row, *(replace(alias, name=name) for name in self.names[1:])]


def _plan(model: nn.Module, selection: Selection) -> list[_Layer]:
    """Decides on every module that has weights, and checks what will be quantized; changes nothing."""
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear) or any(value is not None for value in module._parameters.values()):
            names_of.setdefault(module, []).append(name)
    selection.check_patterns([name for names in names_of.values() for name in names])
    owners = _owners(names_of)
    seen: set[object] = set()
    layers = []
    for module, names in names_of.items():
        scheme, reason = _decide(module, names, selection, owners)
        size = _bytes(module, seen)
        row = Row(names[0], type(module).__name__, "kept", reason, "", size, size)
        layers.append(_Layer(names, module, scheme, row))
    for layer in layers:
        if layer.scheme is not None:
            _require_finite(layer)
    return layers


def _decide(
    module: nn.Module, names: list[str], selection: Selection, owners: dict[object, list[str]]
) -> tuple[Scheme | None, str]:
    if isinstance(module, QuantLinear):
        return None, "already quantized"
    if not isinstance(module, nn.Linear):
        return None, "no scheme for this kind"
    scheme, reason = selection.choose(module, names)
    if scheme is None:
        return None, reason
    obstacle = _reason_to_keep(module, names[0], owners) or scheme.reason_to_keep(module)
    return (None, obstacle) if obstacle else (scheme, "")


def _reason_to_keep(linear: nn.Linear, name: str, owners: dict[object, list[str]]) -> str | None:
    """Why a replacement would change what the model does, whatever the scheme; None if it would not."""
    weight: Any = linear._parameters.get("weight")
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if parametrize.is_parametrized(linear):
        return "parametrized: torch.nn.utils.parametrize.remove_parametrizations makes it an ordinary layer"
    if is_lazy(weight):
        return "not initialized yet: run the model once"
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"{type(linear).__name__} has a forward of its own"
    if weight is None:
        return "its weight is no parameter: remove weight_norm, spectral_norm or pruning first"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if any(
        (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    ):
        return "has hooks: remove them, quantize, and register them on the new layer"
    others = [owner for owner in owners[_identity(weight)] if owner != f"{name}.weight"]
    return f"weight is tied to {', '.join(others)}" if others else None


def _require_finite(layer: _Layer) -> None:
    # Both are NaN if one element is, and no copy of the weight is made.
    low, high = layer.module.weight.detach().aminmax()
    if not (low.isfinite() and high.isfinite()):
        name = layer.names[0]
        raise ValueError(
            f"{name}.weight holds NaN or Inf, only finite weights can be quantized; repair it, or keep the "
            f"layer with exclude={name!r}"
        )


def _owners(modules: dict[nn.Module, list[str]]) -> dict[object, list[str]]:
    """Full names of all parameters that live at the same place, by that place."""
    owners: dict[object, list[str]] = {}
    for module, names in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append(f"{names[0]}.{attribute}")
    return owners


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that start at the same address; tensors without memory are equal to themselves only."""
    if is_lazy(tensor) or tensor.device.type != "cpu" or type(tensor.data) is not torch.Tensor:
        return id(tensor)
    return ("address", tensor.data_ptr()) if tensor.numel() else id(tensor)


def _bytes(module: nn.Module, seen: set[object]) -> int:
    """Bytes of the module's own parameters and buffers, without those in `seen`, where they are added."""
    total = 0
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None or is_lazy(tensor) or _identity(tensor) in seen:
            continue
        seen.add(_identity(tensor))
        total += tensor.nbytes
    return total


def _slots(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where a module hangs in the model, by the module's id: (parent, attribute)."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            slots.setdefault(id(child), []).append((parent, attribute))
    return slots


def _with_progress(layers: list[_Layer], progress: bool) -> Iterable[_Layer]:
    if not progress:
        return layers
    from tqdm.auto import tqdm  # not at the top: in a notebook without ipywidgets its import alone warns

    return tqdm(layers, desc="quantizing", unit="layer")


def _report(layers: list[_Layer]) -> QuantizationReport:
    report = QuantizationReport([row for layer in layers for row in layer.rows()])
    if not report.quantized:
        _log.warning("no layer was quantized; the reasons: %s", sorted({row.reason for row in report.rows}))
    return report


def _require_module(who: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
