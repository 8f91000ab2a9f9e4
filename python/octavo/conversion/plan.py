# SPDX-License-Identifier: Apache-2.0
"""Looks at every module with weights and decides what is to be done with it; changes nothing.

What can go wrong goes wrong here, before any layer is replaced. A plan is a list of layers, each with the scheme that
will serve it, or with the reason why it stays float. The report has a row for each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..methods.absorbing import LAYER_HAS_HOOKS, has_hooks, reason_to_stay
from ..nn import OurEmbedding, PreparedLinear, QuantLinear, StaticQuantLinear
from ..nn.embedding import obstacle_of
from ..nn.replacements import contradiction, embedding_of, kind_of, replacement_of
from ..schemes import Scheme, label
from .bypassed import bypassed_layers
from .report import QuantizationReport, Row, experts_joined
from .selection import Selection

__all__ = [
    "Layer",
    "bytes_of_module",
    "has_hooks",
    "plan_freezing",
    "plan_quantization",
    "plan_skeleton",
    "report_of",
]

_log = logging.getLogger("octavo")

Decision = tuple[Scheme | None, str]  # the scheme that serves a module, or None and the reason to keep it


@dataclass
class Layer:
    """A module with weights, all its names, and the scheme that it gets; without a scheme it stays as it is.

    shares   the layer before it whose weight it will share, because their float weights are tied
    """

    names: list[str]
    module: Any
    scheme: Scheme | None
    row: Row
    shares: Layer | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_embedding(self) -> bool:
        return embedding_of(self.module) is not None or isinstance(self.module, OurEmbedding)

    @property
    def needs_data(self) -> bool:
        """Whether batches must be seen before it is frozen; what an embedding reads has no range."""
        return self.scheme is not None and self.scheme.needs_data and not self.is_embedding

    def keep(self, reason: str) -> None:
        self.scheme, self.row = None, replace(self.row, reason=reason)

    def becomes(self, module: nn.Module, action: str, remark: str = "") -> None:
        """Notes that `module` has taken the place of the layer, and what there is to say of it."""
        assert self.scheme is not None
        self.module = module
        seen: set[object] = set()
        reason = remark
        if self.shares is not None:
            bytes_of_module(self.shares.module, seen)
            reason = f"shares the weight of {self.shares.name!r}"
        size = bytes_of_module(module, seen)
        self.row = replace(
            self.row, action=action, reason=reason, scheme=label(self.scheme), bytes_after=size
        )

    def rows(self) -> list[Row]:
        alias = replace(self.row, reason=f"the same module as {self.name!r}", bytes_before=0, bytes_after=0)
        return [self.row, *(replace(alias, name=name) for name in self.names[1:])]


def plan_quantization(model: nn.Module, selection: Selection) -> list[Layer]:
    """What `selection` wants done with each module. Raises: ValueError for NaN or Inf in a weight it wants quantized,
    and for a pattern that matches nothing."""
    layers = _planned(model, selection, has_values=True)
    for layer in layers:
        if layer.scheme is not None:
            require_finite(layer)
    return layers


def plan_skeleton(model: nn.Module, selection: Selection) -> list[Layer]:
    """As `plan_quantization`, for a model on the meta device: the caller must look at dtypes and values."""
    return _planned(model, selection, has_values=False)


def _planned(model: nn.Module, selection: Selection, has_values: bool) -> list[Layer]:
    names_of = _names_of(model)
    embeddings = [name for module, names in names_of.items() if embedding_of(module) for name in names]
    selection.check_patterns([name for names in names_of.values() for name in names], embeddings)
    bypassed = bypassed_layers(model)
    layers = _layers(names_of, lambda module, names: _decide(module, names, selection, bypassed, has_values))
    _settle_ties(layers, _owners(names_of))
    return layers


def plan_freezing(model: nn.Module) -> list[Layer]:
    """A plan in which every prepared layer keeps its scheme and everything else stays as it is."""

    def decide(module: nn.Module, names: list[str]) -> Decision:
        if isinstance(module, PreparedLinear):
            scheme: Any = module.scheme
            return (None, LAYER_HAS_HOOKS) if has_hooks(module) else (scheme, "")
        return None, "already quantized" if isinstance(module, QuantLinear) else "not prepared"

    layers = _layers(_names_of(model), decide)
    first: dict[tuple[int, object], Layer] = {}
    for layer in layers:
        if layer.scheme is not None:
            key = id(layer.module.weight), layer.scheme.weights
            leader = first.setdefault(key, layer)
            layer.shares = leader if leader is not layer and leader.is_embedding else None
    return layers


def report_of(layers: list[Layer]) -> QuantizationReport:
    """The report of all layers. If all of them were kept, a warning is logged."""
    report = QuantizationReport(experts_joined([row for layer in layers for row in layer.rows()]))
    reasons = sorted({row.reason for row in report.rows})
    if not (report.quantized or report.prepared or reasons == ["already quantized"]):
        _log.warning("no layer was quantized; the reasons: %s", reasons)
    return report


def require_finite(layer: Layer) -> None:
    """Raises ValueError if the layer's float weight holds NaN or Inf, or values that its weight format cannot have."""
    # Both are NaN if one element is, and no copy of the weight is made.
    low, high = layer.module.weight.detach().aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(
            f"{layer.name}.weight holds NaN or Inf, only finite weights can be quantized; repair it, or keep the "
            f"layer with exclude={layer.name!r}"
        )
    largest = max(-low.item(), high.item())
    reason = "" if layer.scheme is None else layer.scheme.weights.reason_to_refuse(largest)
    if reason:
        raise ValueError(f"{layer.name}.weight: {reason}, or keep the layer with exclude={layer.name!r}")


def bytes_of_module(module: nn.Module, seen: set[object]) -> int:
    """Bytes of the module's own parameters and buffers, without those in `seen`, where they are added."""
    total = 0
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None or is_lazy(tensor) or _identity(tensor) in seen:
            continue
        seen.add(_identity(tensor))
        total += tensor.nbytes
    return total


def _names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with weights, and all its names."""
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear) or any(value is not None for value in module._parameters.values()):
            names_of.setdefault(module, []).append(name)
    return names_of


def _layers(
    names_of: dict[nn.Module, list[str]], decide: Callable[[nn.Module, list[str]], Decision]
) -> list[Layer]:
    seen: set[object] = set()
    layers = []
    for module, names in names_of.items():
        scheme, reason = decide(module, names)
        size = bytes_of_module(module, seen)
        row = Row(names[0], type(module).__name__, "kept", reason, "", size, size)
        layers.append(Layer(names, module, scheme, row))
    return layers


def _decide(
    module: nn.Module,
    names: list[str],
    selection: Selection,
    bypassed: dict[nn.Module, str],
    has_values: bool,
) -> Decision:
    if isinstance(module, QuantLinear):
        return None, "already quantized"
    if isinstance(module, PreparedLinear):
        return None, "already prepared: octavo.freeze_ quantizes it"
    replacement = replacement_of(module)
    if replacement is not None:
        scheme, reason = selection.choose(module, names)
    elif embedding_of(module) is not None:
        scheme, reason = selection.choose_embedding(module, names)
        scheme = None if scheme is None else scheme.for_embedding
    else:
        return None, _reason_for_kind(module)
    if scheme is None:
        return None, reason
    obstacle: str | None = replacement.unserved if replacement is not None else obstacle_of(module)
    obstacle = obstacle or reason_to_stay(module) or bypassed.get(module)
    if has_values and not obstacle:
        obstacle = scheme.reason_to_keep(module) or contradiction(module)
    return (None, obstacle) if obstacle else (scheme, "")


def _reason_for_kind(module: nn.Module) -> str:
    """Why modules of this class are kept, with a remedy if it is not torch's and holds matrices, as experts do."""
    is_own = not type(module).__module__.startswith("torch.nn.")
    has_matrix = any(
        value is not None and not is_lazy(value) and value.dim() >= 2 for value in module._parameters.values()
    )
    remedy = ": nn.Linear layers in its place would be quantized" if is_own and has_matrix else ""
    return f"no scheme for this kind{remedy}"


def _settle_ties(layers: list[Layer], owners: dict[object, list[str]]) -> None:
    """Layers that are tied to an embedding get one weight for all of them, or stay float as other tied layers do."""
    by_weight = {f"{layer.name}.weight": layer for layer in layers}
    for layer in [layer for layer in layers if layer.scheme is not None]:
        names = owners[_identity(layer.module.weight)]
        if len(names) == 1 or layer.shares is not None:
            continue
        group = [by_weight.get(name) for name in names]
        obstacle = _reason_to_keep_tied(group)
        for name, member in zip(names, group, strict=True):
            if member is None or member.scheme is None:
                continue
            if obstacle is None:
                member.scheme = member.scheme.for_embedding
                member.shares = None if member is group[0] else group[0]
            else:
                others = ", ".join(other for other in names if other != name)
                member.keep(f"weight is tied to {others}{obstacle}")


def _reason_to_keep_tied(group: list[Layer | None]) -> str | None:
    """Why these layers, whose weights are tied, cannot share a quantized one, in words that go on; None if they can.

    None in the group stands for a Parameter that is no layer's `weight`.
    """
    embeddings = [layer for layer in group if layer is not None and layer.is_embedding]
    if not embeddings or None in group:
        return ""
    schemes = [layer.scheme for layer in group if layer is not None]
    if None in schemes:
        asked = all(layer.scheme is not None for layer in embeddings)
        return ", which stays float" if asked else "; include_embeddings=True quantizes both"
    if len({scheme.weights for scheme in schemes if scheme is not None}) > 1:
        return ", for which another weight format is chosen"
    for layer in group:
        if layer is not None and not layer.is_embedding:
            kind = layer.scheme.for_embedding.layer  # type: ignore[union-attr]
            if kind not in (QuantLinear, StaticQuantLinear) or kind_of(layer.module).transposed:
                return f", and {kind.__name__} cannot share a weight with an embedding"
    return None


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
