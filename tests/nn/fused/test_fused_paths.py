# SPDX-License-Identifier: Apache-2.0
"""An encoder that leaves torch's fused path gives at padded positions what that path gives, and only where it does."""

import copy

import pytest
import torch
from asserts import assert_bits_equal
from torch import nn

import octavo


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def padded_encoder(norm: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None).eval()
    if norm:
        nn.init.normal_(encoder.norm.bias)
    return encoder


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
LEFT_PADDING = PADDING.flip(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "padding", [PADDING, torch.zeros(2, 5).masked_fill(PADDING, -torch.inf)], ids=["bool", "float"]
)
@pytest.mark.parametrize("call", ["keyword", "position"])
def test_encoders_give_zeros_at_padding_as_the_float_model_does(norm, padding, call):
    """Zeros, or what the last norm makes of zeros: the same bits."""
    encoder, x = padded_encoder(norm), activations(2, 5, 16)
    models = [octavo.quantized(encoder, octavo.Int8Dynamic()), copy.deepcopy(encoder)]
    octavo.prepare_(models[1], octavo.Int8Dynamic())
    for model in [*models, copy.deepcopy(models[0])]:
        with torch.no_grad():
            if call == "keyword":
                expected, y = (m(x, src_key_padding_mask=padding) for m in (encoder, model))
            else:
                expected, y = (m(x, None, padding) for m in (encoder, model))
        assert_bits_equal(y[PADDING], expected[PADDING])
        assert torch.nn.functional.cosine_similarity(y.mean(1), expected.mean(1)).min() > 0.999


@pytest.mark.parametrize("padding", [None, LEFT_PADDING])
def test_where_the_float_encoder_gives_no_zeros_ours_gives_none(padding):
    encoder, x = padded_encoder(False), activations(2, 5, 16)
    model = octavo.quantized(encoder, octavo.Int8Dynamic())
    with torch.no_grad():
        assert (model(x, src_key_padding_mask=padding) != 0).all()
    model.train()
    assert (model(x, src_key_padding_mask=PADDING) != 0).all()
    encoder.train()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_failed_quantization_leaves_the_encoder_as_it_was():
    encoder, x = padded_encoder(False), activations(2, 5, 16)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=PADDING)
        with pytest.raises(RuntimeError):
            octavo.quantize_(encoder, octavo.Int8Static(), data=activations(2, 5, 17))
        assert_bits_equal(encoder(x, src_key_padding_mask=PADDING), expected)
    assert encoder.use_nested_tensor and not encoder._forward_hooks
