# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight somebody else multiplies by are kept float, with the reason; every other one is quantized."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import octavo


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)


class Multiplies(Base):
    def forward(self, x):
        return F.linear(x, self.one.weight, self.one.bias) + self.two(x)


class MultipliesElsewhere(Base):
    def forward(self, x):
        if x.dtype != self.two.weight.dtype or self.two.weight.shape[0] != 4:
            x = x.to(self.two.weight.dtype)
        return self.inner(x)

    def inner(self, x):
        return (self.one.weight @ self.two(x).mT).mT + self.one.bias


class Inherits(Multiplies):
    def __init__(self):
        super().__init__()
        self.three = nn.Linear(4, 4)


class ReadsAndCalls(Base):
    def forward(self, x):
        return self.one(x) * self.one.weight.abs().max() + self.two(x)


class HandsOn(Base):
    """Nobody can tell what becomes of the layer."""

    def forward(self, x):
        return run(self.one, x) + F.linear(x, self.one.weight) + self.two(x)


class AsksItsBase(ReadsAndCalls):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.one.weight)


def run(layer, x):
    return layer(x)


class FillsOnly(Base):
    """What is not reached from forward does not count."""

    def forward(self, x):
        return run(getattr(self, "one"), self.two(x))  # noqa: B009

    def reset_parameters(self):
        nn.init.zeros_(self.one.weight)


@pytest.mark.parametrize("kind", [Multiplies, MultipliesElsewhere, Inherits])
@pytest.mark.parametrize("act", [octavo.quantize_, octavo.prepare_])
def test_a_layer_whose_weight_is_read_and_that_is_not_called_stays_float(kind, act):
    model = nn.Sequential(kind())
    report = act(model, octavo.Int8Dynamic())
    reasons = {row.name: row.reason for row in report.kept}
    assert reasons == {"0.one": f"{kind.__name__} reads its weight without calling it"}
    assert type(model[0].one) is nn.Linear and model[0](torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("kind", [ReadsAndCalls, HandsOn, AsksItsBase, FillsOnly])
def test_a_layer_that_is_called_or_may_be_is_quantized(kind):
    assert not octavo.quantize_(kind(), octavo.Int8Dynamic()).kept


def test_a_forward_without_a_source_tells_nothing():
    space = {"F": F, "Base": Base}
    exec("class Typed(Base):\n    def forward(self, x):\n        return F.linear(x, self.one.weight)", space)
    assert not octavo.quantize_(space["Typed"](), octavo.Int8Dynamic()).kept
    model = Multiplies()
    model.forward = lambda x: model.one(x)
    assert not octavo.quantize_(model, octavo.Int8Dynamic()).kept


def test_models_of_transformers_that_multiply_themselves():
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    report = octavo.quantize_(transformers.WavLMModel(config).eval(), octavo.Int8Dynamic())
    read = [
        row.name for row in report.kept if row.reason == "WavLMAttention reads its weight without calling it"
    ]
    assert read == [f"encoder.layers.0.attention.{name}_proj" for name in ("k", "v", "q", "out")]
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    report = octavo.quantize_(transformers.T5Model(config).eval(), octavo.Int8Dynamic())
    assert not [row for row in report.kept if row.kind == "Linear"]
