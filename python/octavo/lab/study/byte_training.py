# SPDX-License-Identifier: Apache-2.0
"""How the byte language model is trained: from random weights by tools/train_byte_lm.py, on through the rounding of
few bits by `octavo study --train`.

Windows of the training text, drawn by a seed: the same bits come out for the same Python, torch, CPU and number of
threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...nn import PreparedLinear
from .byte_lm import ByteLM

# How much of itself a learned scale moves for each unit of learning rate: 1% a step at 1e-3.
SCALE_SHARE = 10.0


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train, and from which random numbers.

    A learning rate of 2e-3, with GPT-2's initial weights, was tried: held-out perplexity 4.06 instead of 3.30.
    """

    steps: int = 1800
    batch: int = 24
    learning_rate: float = 5e-3
    warmup: int = 100
    seed: int = 0


def train(
    model: ByteLM,
    text: torch.Tensor,
    config: TrainingConfig,
    after_step: Callable[[int, float], object] = lambda step, loss: None,
) -> ByteLM:
    """Trains all Parameters of `model`, in place, on windows of `text`; returns it in eval mode.

    model        float or prepared
    text         uint8 [bytes]
    after_step   called with the number of the step, from 1, and its loss in nats per byte
    """
    context = model.context
    optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(step, config)
        starts = torch.randint(len(text) - context, (config.batch, 1), generator=generator)
        windows = text[starts + torch.arange(context + 1)].long()
        loss = next_byte_loss(model, windows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(step, loss.item())
    return model.eval()


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step: a linear warm-up, then a half cosine down to a tenth."""
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def next_byte_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood, nats per byte, of windows int64 [windows, context + 1]."""
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups: weights and the rest, and a group for each learned scale and offset.

    AdamW moves an element by about the learning rate, whatever its gradient. That is a small step for weights and would
    be half of an 8-bit scale, so a scale's step is a share of the scale. An offset, which may be 0, counts in scales:
    its step is a share of the layer's input_scale.
    """
    scale_of: dict[nn.Parameter, nn.Parameter] = {}
    for layer in (module for module in model.modules() if isinstance(module, PreparedLinear)):
        learned = dict(layer.named_parameters())
        scale_of |= {p: p for name, p in learned.items() if name.endswith("_scale")}
        if "input_offset" in learned:
            scale_of[learned["input_offset"]] = learned["input_scale"]
    others = [p for p in model.parameters() if p not in scale_of]
    return [
        {"params": others, "share": 1.0},
        *(
            {"params": [p], "share": SCALE_SHARE * scale.mean().item(), "weight_decay": 0.0}
            for p, scale in scale_of.items()
        ),
    ]
