# SPDX-License-Identifier: Apache-2.0
"""torch's fused transformer layers read weights instead of calling layers: with quantized layers they do not."""

import torch
from torch import nn

import octavo
from octavo.nn import leave_fused_paths


def test_transformer_encoder_in_eval_mode_calls_the_quantized_layers():
    """Its fused path would read `linear1.weight`, a dequantized copy, and call nothing of ours."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2
    ).eval()
    octavo.quantize_(encoder, octavo.Int8Dynamic())
    calls = []
    encoder.layers[0].linear1.register_forward_pre_hook(lambda layer, args: calls.append("in"))
    encoder.layers[1].linear1.forward = lambda x, forward=encoder.layers[1].linear1.forward: (
        calls.append("in"),
        forward(x),
    )[1]
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        encoder(torch.randn(2, 5, 16), src_key_padding_mask=padding)
    assert calls == ["in", "in"]


def test_fused_paths_of_float_models_are_left_alone():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    quantized = octavo.Int8Dynamic().quantize_linear(nn.Linear(4, 4))
    before = layer.activation_relu_or_gelu
    leave_fused_paths(nn.Sequential(layer, quantized))
    assert layer.activation_relu_or_gelu == before != 0
