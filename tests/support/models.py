# SPDX-License-Identifier: Apache-2.0
"""What tests share: a small model of embedding, two blocks and a head; every registered scheme in all its variants, and
how far a layer of any of them may be from the float one."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import octavo
from octavo.formats import Int8
from octavo.nn import QuantLinear, SmoothedLinear, StaticQuantLinear
from octavo.schemes import SCHEMES, Scheme


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(self.attention(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.encoder = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.encoder:
            x = block(x)
        return self.head(self.norm(x))


LINEARS = [
    "encoder.0.attention",
    "encoder.0.mlp.0",
    "encoder.0.mlp.2",
    "encoder.1.attention",
    "encoder.1.mlp.0",
    "encoder.1.mlp.2",
    "head",
]
IDS = torch.arange(10).reshape(2, 5)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def variants() -> list[Scheme]:
    """Each scheme of Int8 weights with each combination of its boolean fields, and one that goes before another one.

    Schemes of other formats have files of tests of their own, in tests/formats.
    """
    result: list[Scheme] = [octavo.Int8Static(method=octavo.SmoothQuant())]
    for scheme in SCHEMES.values():
        if not isinstance(scheme().weights, Int8):
            continue
        flags = [field.name for field in dataclasses.fields(scheme) if isinstance(field.default, bool)]
        for values in itertools.product([True, False], repeat=len(flags)):
            result.append(scheme(**dict(zip(flags, values, strict=True))))
    return result


every_scheme = pytest.mark.parametrize("scheme", variants(), ids=repr)


def input_multiplier(layer: QuantLinear) -> torch.Tensor:
    """What a layer does to its input before anything else, float64 [k] or []."""
    is_smoothed = isinstance(layer, SmoothedLinear)
    return layer.input_multiplier.detach().double() if is_smoothed else torch.ones((), dtype=torch.float64)


def rounding_bound(linear: nn.Linear, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """What rounding weights and input to codes may change in each output of `linear` for x [m, k].

    |xw - x'w'| <= |x| dw + dx |w| + dx dw with dw half a step, and dx as below; half a step of an int32 bias. Then
    float32 has its share: 2^-12 of that, as assert_within_scale counts it for 255 steps, and 2^-20 for the sum and the
    bias.
    """
    multiplier = input_multiplier(layer)
    x, w = x.double() * multiplier, linear.weight.detach().double() / multiplier
    dw, dx = layer.weight_scale.detach().double().expand_as(w) / 2, _input_error(layer, x)
    return (x.abs() @ dw.T + dx @ w.abs().T + dx @ dw.T + bias_error(layer)) * (1 + 2**-12) + 2**-20


def has_int32_bias(layer: QuantLinear) -> bool:
    return layer.bias is not None and layer.bias.dtype == torch.int32


def bias_error(layer: QuantLinear) -> torch.Tensor:
    """What rounding the bias may change in each output, float64 [n]: half a step of an int32 bias."""
    if not has_int32_bias(layer):
        return torch.zeros(layer.out_features, dtype=torch.float64)
    return layer.input_scale.detach().double() * layer.weight_scale.detach().double().reshape(-1) / 2


def bias_of(layer: QuantLinear) -> torch.Tensor:
    """What a row of zeros gives, float32 [n]."""
    bias = layer.bias.detach()
    if not has_int32_bias(layer):
        return bias
    return bias.float() * (layer.input_scale * layer.weight_scale.reshape(-1)).detach()


def _input_error(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """Half a step of the row, or, if the scale is fixed, half a step or the way back into its range."""
    if not isinstance(layer, StaticQuantLinear):  # affine codes and more bits have smaller steps
        return (x.abs().amax(1, keepdim=True) / 127 / 2).expand_as(x)
    scale, zero_point = layer.input_scale.detach().double(), layer.input_zero_point
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    return torch.maximum(low - x, x - high).maximum(scale / 2)
