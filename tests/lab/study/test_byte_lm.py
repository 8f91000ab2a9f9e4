# SPDX-License-Identifier: Apache-2.0
"""The model in the package is a trained one, causal, of the documented size, and both int8 schemes stay close to it."""

import math

import pytest
import torch
from torch import nn

import octavo
from octavo import metrics
from octavo.lab.study import byte_lm, byte_text


@pytest.fixture(scope="module")
def model() -> byte_lm.ByteLM:
    return byte_lm.load()


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return byte_text.held_out(16)


def logits_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(windows[:, :-1])


def test_it_has_842_496_parameters_and_16_linear_layers_in_its_blocks(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 842_496
    assert sum(isinstance(module, nn.Linear) for module in model.blocks.modules()) == 16
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_its_float32_weights_are_bfloat16_values(model):
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())
    assert byte_lm.CHECKPOINT.stat().st_size < 842_496 * 2 + 10_000


def test_it_predicts_text_that_it_has_not_seen(model, windows):
    """Perplexity. Guessing gives 256; counts of the training text's bytes, pairs and triples give 24, 11.6 and 6.3."""
    loss = nn.functional.cross_entropy(logits_of(model, windows).flatten(0, 1), windows[:, 1:].flatten())
    assert math.exp(loss) < 5


def test_a_byte_never_depends_on_those_after_it(model, windows):
    changed = windows[:, :-1].clone()
    changed[:, 60:] = ord("x")
    with torch.inference_mode():
        assert torch.equal(model(windows[:, :-1])[:, :60], model(changed)[:, :60])


def test_too_long_an_input_is_refused(model):
    with pytest.raises(ValueError, match="ids has 129 bytes, at most 128 are allowed"):
        model(torch.zeros(1, 129, dtype=torch.int64))


def test_quantize_takes_the_block_layers_and_keeps_the_tied_head(model):
    report = octavo.quantize_(byte_lm.load(), octavo.Int8Dynamic())
    assert len(report.quantized) == 16 and all(row.name.startswith("blocks.") for row in report.quantized)
    assert "tied" in next(row.reason for row in report.kept if row.name == "head")


def test_weight_only_is_closer_to_float_than_dynamic(model, windows):
    expected = logits_of(model, windows)
    divergences = [
        metrics.kld(expected, logits_of(octavo.quantized(model, scheme), windows)).mean()
        for scheme in (octavo.Int8WeightOnly(), octavo.Int8Dynamic())
    ]
    assert 0 < divergences[0] < divergences[1]
