# SPDX-License-Identifier: Apache-2.0
"""The training script: the same weights for the same seed, a falling loss, and a file that loads."""

import importlib
from pathlib import Path

import pytest
import torch

from octavo import byte_lm

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("train_byte_lm")


def tiny_model() -> byte_lm.ByteLM:
    torch.manual_seed(0)
    return byte_lm.ByteLM(width=16, blocks=1, heads=2, context=8)


TEXT = torch.frombuffer(bytearray(b"def f(x):\n    return x\n" * 20), dtype=torch.uint8)


def test_training_lowers_the_loss_and_repeats_bit_for_bit(script):
    config = script.Config(steps=6, batch=4, learning_rate=1e-2, warmup=2)
    models, losses = [tiny_model(), tiny_model()], ([], [])
    for model, seen in zip(models, losses, strict=True):
        script.train(model, TEXT, config, lambda _, loss, seen=seen: seen.append(loss))
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert losses[0][-1] < losses[0][0]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name])


def test_another_seed_gives_other_weights(script):
    models = [script.train(tiny_model(), TEXT, script.Config(steps=2, batch=2, seed=seed)) for seed in (0, 1)]
    assert not torch.equal(models[0].blocks[0].mlp[0].weight, models[1].blocks[0].mlp[0].weight)


def test_the_learning_rate_rises_then_falls_to_a_tenth(script):
    config = script.Config()
    rates = [script.learning_rate(step, config) for step in range(1, config.steps + 1)]
    peak = config.warmup - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert rates[peak] == config.learning_rate and rates[-1] == pytest.approx(0.1 * config.learning_rate)


def test_what_is_saved_loads_as_the_bfloat16_values(script, tmp_path):
    torch.manual_seed(0)
    model = byte_lm.ByteLM()
    script.save(model, tmp_path / "new" / "model.safetensors")
    loaded = byte_lm.load(tmp_path / "new" / "model.safetensors")
    assert loaded.head.weight is loaded.embedding.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())
