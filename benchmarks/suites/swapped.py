# SPDX-License-Identifier: Apache-2.0
"""Whole models with only their Linears swapped: the candidates that encoder.py and decoder.py compare.

One of them has no Linears at all: what it needs is the part of the time that no linear layer can win back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import octavo
from octavo.lab.bench import quantize_dynamic_

FLOOR = "without Linears"


class NoProduct(nn.Module):
    """In the place of a Linear: takes no time, returns memory that nobody has written."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], self.out_features))


def without_linears(model: nn.Module) -> nn.Module:
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                parent._modules[attribute] = NoProduct(child.out_features)
    return model


def by_octavo(model: nn.Module, scheme: octavo.schemes.Scheme) -> nn.Module:
    octavo.quantize_(model, scheme)
    return model


# Each changes the model in place, so that a process of its own shows what the conversion takes.
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch fp32": lambda model: model,
    "torch bf16": lambda model: model.bfloat16(),
    "quantize_dynamic": quantize_dynamic_,
    "quantize_dynamic per channel": lambda model: quantize_dynamic_(model, per_channel=True),
    "octavo Int8Dynamic": lambda model: by_octavo(model, octavo.Int8Dynamic()),
    "octavo Int8WeightOnly": lambda model: by_octavo(model, octavo.Int8WeightOnly()),
    FLOOR: without_linears,
}


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every candidate, made of a copy of `model`."""
    return {name: convert(copy.deepcopy(model)) for name, convert in CONVERSIONS.items()}


def megabytes(model: nn.Module) -> float:
    """Millions of bytes of all parameters and buffers, those inside torch.ao's layers included."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            tensors += [tensor for tensor in module._weight_bias() if tensor is not None]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values()) / 1e6
