# SPDX-License-Identifier: Apache-2.0
"""Training the byte language model: the same weights for the same seed, a falling loss, steps to fit scales."""

import copy

import pytest
import torch

import octavo
from octavo.lab.study import byte_lm
from octavo.lab.study.byte_training import SCALE_SHARE, TrainingConfig, learning_rate, train
from octavo.nn import PreparedLinear


def tiny_model() -> byte_lm.ByteLM:
    torch.manual_seed(0)
    return byte_lm.ByteLM(width=16, blocks=1, heads=2, context=8)


TEXT = torch.frombuffer(bytearray(b"def f(x):\n    return x\n" * 20), dtype=torch.uint8)


def test_training_lowers_the_loss_and_repeats_bit_for_bit():
    config = TrainingConfig(steps=6, batch=4, learning_rate=1e-2, warmup=2)
    models, losses = [tiny_model(), tiny_model()], ([], [])
    for model, seen in zip(models, losses, strict=True):
        train(model, TEXT, config, lambda _, loss, seen=seen: seen.append(loss))
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert losses[0][-1] < losses[0][0]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name])


def test_another_seed_gives_other_weights():
    models = [train(tiny_model(), TEXT, TrainingConfig(steps=2, batch=2, seed=seed)) for seed in (0, 1)]
    assert not torch.equal(models[0].blocks[0].mlp[0].weight, models[1].blocks[0].mlp[0].weight)


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    config = TrainingConfig()
    rates = [learning_rate(step, config) for step in range(1, config.steps + 1)]
    peak = config.warmup - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert rates[peak] == config.learning_rate and rates[-1] == pytest.approx(0.1 * config.learning_rate)


@pytest.mark.parametrize("bits", [8, 2])
def test_a_step_moves_a_learned_scale_by_a_share_of_its_size(bits):
    """Adam's first step is the learning rate for every element with a gradient, however large that is."""
    model = tiny_model()
    octavo.prepare_(model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(bits)), learn_scales=True)
    before = copy.deepcopy(model)
    train(model, TEXT, TrainingConfig(steps=1, batch=2, learning_rate=1e-3, warmup=1))
    for old, new in zip(before.modules(), model.modules(), strict=True):
        if isinstance(new, PreparedLinear):
            step = SCALE_SHARE * 1e-3 * old.weight_scale.mean()
            moved = (new.weight_scale - old.weight_scale).abs()
            rounding = torch.finfo(torch.float32).eps * old.weight_scale.max()
            assert 0 < moved.max() <= step + rounding


def test_a_step_moves_a_learned_offset_by_a_share_of_its_scale():
    """Weight decay would pull it towards 0 as well, by an amount of its own size."""
    model = tiny_model()
    octavo.prepare_(model, octavo.Int8Static(symmetric=False), learn_scales=True)
    with octavo.calibrating(model):
        model(TEXT[:64].long().reshape(8, 8))
    before = copy.deepcopy(model)
    train(model, TEXT, TrainingConfig(steps=1, batch=2, learning_rate=1e-3, warmup=1))
    moved = []
    for old, new in zip(before.modules(), model.modules(), strict=True):
        if isinstance(new, PreparedLinear):
            step = SCALE_SHARE * 1e-3 * old.input_scale
            moved.append((new.input_offset - old.input_offset).abs().item())
            assert moved[-1] <= step + torch.finfo(torch.float32).eps * old.input_offset.abs()
    assert max(moved) > 0
