# SPDX-License-Identifier: Apache-2.0
"""LoftQ: an adapter that starts with what rounding takes from a weight. docs/numerics.md, eq. 130."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base import configs
from ..base.patterns import Patterns
from ..conversion.convert import quantize_, quantized
from ..conversion.plan import Layer, plan_quantization
from ..conversion.selection import SchemeLike, Selection
from ..nn.adapters import LoRA
from ..nn.adapters.base import require_rank
from ..nn.replacements import bias_of, matrix_of, weight_of, with_tensors
from .adapt import adapt_, adapter_layers, require_free
from .report import AdapterReport


def loftq_(
    model: nn.Module,
    scheme: SchemeLike,
    adapter: LoRA,
    name: str = "default",
    *,
    iterations: int = 5,
    include: Patterns = None,
    exclude: Patterns = None,
) -> AdapterReport:
    """Quantizes the linear layers of a float model, in place, and puts LoRA on them that starts with part of the error.

    For each layer rounding and a singular value decomposition take turns: Q of W - s B A, then A and B of W - Q. Of all
    turns the best one is kept.
    scheme       one that needs no data
    adapter      without `targets`: it goes on the layers that are quantized
    iterations   turns, at least 1
    returns      AdapterReport; its details say which share of the squared error is left, of that of rounding alone
    raises       as `quantize_` and `adapt_`; ValueError for schemes that need data, for DoRA and for `targets`. The
                 model is then unchanged
    Peak memory: the float model twice.
    source       Li et al. 2023 (arXiv:2310.08659), algorithm 1; keeping the best turn: ours
    """
    adapter = configs.instance("loftq_: adapter", LoRA, adapter, "octavo.LoRA(r=8)")
    if adapter.targets is not None or adapter.dora:
        raise ValueError(
            "loftq_: the adapter must have no targets, because it goes on the layers that are quantized (include and "
            "exclude choose them), and no dora"
        )
    require_rank("loftq_: iterations", iterations)
    require_free("loftq_", model, name)
    layers = _layers(model, Selection(scheme, include, exclude))
    originals = [(each.module, each.module.weight) for each in layers]
    try:
        found = {each.name: _absorb_(each, adapter, iterations) for each in layers}
        quantize_(model, scheme, include=include, exclude=exclude)
    except BaseException:
        for module, weight in originals:
            module.weight = weight
        raise
    report = adapt_(model, replace(adapter, targets=list(found)), name)
    _, own = adapter_layers("loftq_", model, name)
    with torch.no_grad():
        for each, ((a, b), _) in found.items():
            own[each].A.copy_(a)
            own[each].B.copy_(b)
    details = {each: f"{own[each].summary()}, {share:.0%} of the error" for each, (_, share) in found.items()}
    return replace(
        report, rows=[replace(row, detail=details.get(row.name, row.detail)) for row in report.rows]
    )


def _layers(model: nn.Module, selection: Selection) -> list[Layer]:
    layers = [layer for layer in plan_quantization(model, selection) if layer.scheme is not None]
    for layer in layers:
        if layer.scheme is not None and layer.scheme.needs_data:
            raise ValueError(
                f"loftq_: {layer.scheme.name} needs data; use one that needs none, such as octavo.NF4()"
            )
    return layers


def _absorb_(layer: Layer, adapter: LoRA, iterations: int) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Gives the float layer the weight W - s B A; returns A, B and the share of the squared error that is left."""
    module: Any = layer.module
    matrix = matrix_of(module).detach().float()
    new = adapter.layer(layer.name, module)
    a, b = new.A.detach().clone(), new.B.detach().clone()
    best, start, plain, least = (a, b), (a, b), 0.0, float("inf")
    for turn in range(iterations):
        rounded = _rounded(layer, matrix - new.scaling * (b @ a))
        if turn == 0:
            plain = float((matrix - rounded).double().square().sum())
        before = a, b
        a, b = _largest_parts(matrix - rounded, len(a), new.scaling)
        error = float((matrix - rounded - new.scaling * (b @ a)).double().square().sum())
        if error < least:
            best, start, least = (a, b), before, error
    a, b = start  # rounding what they leave gives the codes that belong to the best factors
    weight = weight_of(module, matrix - new.scaling * (b @ a)).to(module.weight.dtype)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    return best, least / plain if plain else 1.0


def _rounded(layer: Layer, matrix: torch.Tensor) -> torch.Tensor:
    module: Any = layer.module
    weight = weight_of(module, matrix).contiguous().to(module.weight.dtype)
    found: Any = quantized(with_tensors(module, weight, bias_of(module)), layer.scheme)
    return found.dequantize()


def _largest_parts(matrix: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, k] and B [n, r] with which s B A is the nearest matrix of rank r: the factors share the singular values."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = (values[:r] / scaling).sqrt()
    more = max(0, r - len(roots))  # a rank that the matrix has not: zeros
    return F.pad(roots[:, None] * v[:r], (0, 0, 0, more)), F.pad(u[:, :r] * roots, (0, more))
