# SPDX-License-Identifier: Apache-2.0
"""What tests share: a small model of embedding, two blocks and a head; every registered scheme in all its variants."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

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
    """Each scheme with each combination of its boolean fields."""
    result = []
    for scheme in SCHEMES.values():
        flags = [field.name for field in dataclasses.fields(scheme) if isinstance(field.default, bool)]
        for values in itertools.product([True, False], repeat=len(flags)):
            result.append(scheme(**dict(zip(flags, values, strict=True))))
    return result


every_scheme = pytest.mark.parametrize("scheme", variants(), ids=repr)
