# SPDX-License-Identifier: Apache-2.0
"""A quantized layer whose output only an activation module reads computes the activation itself, on its way out.

Who reads what is found by watching the example run. Which function a module is, is told by the values it gives, not by
its class: every model library has a GELU of its own. The module becomes nn.Identity, the layer says so in its repr.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from ... import ops
from ...conversion.plan import has_hooks
from ...methods.tracing import Source, traced
from ...nn import OurEmbedding, QuantLinear
from ..example import Example
from ..paths import Proofs, other_paths
from ..step import MODULE_HAS_HOOKS, Candidate, Changes
from ..verify import FLOAT32_ERROR

ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
# Around zero, where the functions differ most from each other, and far out, where clipped ones stop.
PROBE = torch.cat([torch.linspace(-12, 12, 193), torch.tensor([-1e4, -100.0, 100.0, 1e4])])


class ActivationFunctions:
    """Replaces a quantized layer and the activation after it by the layer with that activation."""

    name = "activations"

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        leaves = [module for module in model.modules() if _may_be_activation(module)]
        with traced(model, leaves, is_producer=is_quantized) as trace:
            example.run()
        names = {module: name for name, module in model.named_modules()}
        return [
            candidate
            for module in leaves
            for candidate in _candidates(model, names, module, trace.inputs[module], example.proofs)
        ]


def activation_of(module: nn.Module, proofs: Proofs | None = None) -> str | None:
    """Which of ops.ACTIVATIONS the module computes, told by its values; None for any other, and for one whose graph has
    another path for some values. `proofs` is what is known of modules' graphs already."""
    if not _may_be_activation(module):
        return None
    try:
        with torch.no_grad():
            found = module.forward(PROBE.clone())
    except Exception:  # it takes something else
        return None
    if not isinstance(found, torch.Tensor) or found.shape != PROBE.shape or found.dtype != PROBE.dtype:
        return None
    for activation in ops.ACTIVATIONS:
        expected = ops.torch_activation(PROBE, activation)
        if bool(((found - expected).abs() <= 2 * FLOAT32_ERROR * expected.abs().clamp(min=1.0)).all()):
            inputs = {"": PROBE.reshape(1, -1, 1).expand(2, -1, 2).contiguous()}
            has_paths = other_paths(module, inputs, {} if proofs is None else proofs, kinks=True)
            return None if has_paths else activation
    return None


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) and not isinstance(module, OurEmbedding)


def _may_be_activation(module: nn.Module) -> bool:
    has_state = bool(module._parameters or module._buffers or module._modules)
    return not has_state and not isinstance(module, nn.Identity | nn.Dropout)


def _candidates(
    model: nn.Module,
    names: dict[nn.Module, str],
    module: nn.Module,
    sources: set[Source | None],
    proofs: Proofs,
) -> list[Candidate]:
    """A candidate for each quantized layer that `module` reads: all of them are fused, or none."""
    producers = {source.producer for source in sources if source is not None}
    layers = [layer for layer in names if layer in producers]
    kind = type(module).__name__
    if not layers:
        is_one = type(module).__module__ in ACTIVATION_MODULES and bool(sources)
        return [Candidate(names[module], kind, "does not read what a quantized layer gives")] * is_one
    activation = activation_of(module, proofs)
    if activation is None:
        return [Candidate(names[module], kind, f"is none of {', '.join(ops.ACTIVATIONS)}")]
    group = [Candidate(names[layer], kind, _obstacle(layer, module, sources)) for layer in layers]
    for candidate, layer in zip(group, layers, strict=True):
        trial: Any = copy.copy(layer)  # shares the parameters
        trial.activation = activation
        candidate.partners = group
        candidate.reads, candidate.gives, candidate.compute = layer, module, trial.forward
        candidate.bound = partial(_bound, layer)
        candidate.apply = partial(_apply, model, layer, module, activation)
    return group


def _obstacle(layer: Any, module: nn.Module, sources: set[Source | None]) -> str:
    if None in sources:
        return "the activation also reads what no quantized layer gives"
    if any(source is not None and (source.has_other_use or len(source.consumers) > 1) for source in sources):
        return "what the layer gives is read elsewhere, too"
    if layer.activation is not None:
        return "the layer has an activation already"
    return MODULE_HAS_HOOKS if has_hooks(layer) or has_hooks(module) else ""


def _bound(layer: nn.Module, expected: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """The bound for half precision: modules round the layer's output and in between, the fused layer rounds once."""
    y = expected.float().abs()
    if expected.dtype == torch.float32:
        return FLOAT32_ERROR * y.clamp(min=1.0)
    return 4 * torch.finfo(expected.dtype).eps * (layer.forward(input).float().abs() + y)


def _apply(model: nn.Module, layer: nn.Module, module: nn.Module, activation: str, changes: Changes) -> None:
    changes.set(layer, "activation", activation)
    changes.replace(model, module, nn.Identity())
