# SPDX-License-Identifier: Apache-2.0
"""A decoder like Llama, quantized, after octavo.fuse_ and with octavo.nn.KVCache: milliseconds for each token at a
short and at a long context. Weights and sizes are those of decoder.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import octavo
from octavo.runtime.timing import interleaved
from suites.decoder import SIZES, decoder
from timing import milliseconds

CONTEXTS = [32, 512, 2048]
DECODED = 8  # tokens in one timed call
Cache = Callable[[Any], Any]


class Decoding:
    """Each call decodes DECODED tokens greedily, one at a time, from the same context."""

    def __init__(self, model: Any, cache: Any, context: int):
        self.model, self.cache, self.context = model, cache, context
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(0, SIZES["vocab_size"], (1, context), generator=generator)
        self.first = model(prompt, cache=cache, logits_to_keep=1).logits.argmax(-1)

    def __call__(self) -> list[int]:
        decoded = self.cache.get_seq_length() - self.context
        if decoded:
            self.cache.crop(-decoded)
        token, tokens = self.first, []
        for _ in range(DECODED):
            token = self.model(token, cache=self.cache, logits_to_keep=1).logits.argmax(-1)
            tokens.append(int(token))
        return tokens


def candidates() -> dict[str, tuple[nn.Module, Cache]]:
    """Model, and what makes its cache."""
    unfused = octavo.quantized(decoder(), octavo.Int8Dynamic())
    unfused.config.max_position_embeddings = max(CONTEXTS) + DECODED
    fused = copy.deepcopy(unfused)
    octavo.fuse_(fused, [torch.arange(64)[None]])

    def dynamic(config: Any) -> Any:
        return transformers.DynamicCache(config=config)

    return {
        "octavo Int8Dynamic": (unfused, dynamic),
        "octavo Int8Dynamic, fused": (fused, dynamic),
        "octavo Int8Dynamic, fused, KVCache": (fused, octavo.nn.KVCache),
        "octavo Int8Dynamic, fused, KVCache bfloat16": (
            fused,
            lambda config: octavo.nn.KVCache(config, dtype=torch.bfloat16),
        ),
    }


def measure(rounds: int = 9) -> list[dict[str, object]]:
    """Milliseconds per decoded token, and their ratio to the quantized model as it was."""
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        models = candidates()
        for context in CONTEXTS:
            runs = {
                name: Decoding(model, cache(model.config), context) for name, (model, cache) in models.items()
            }
            expected = runs["octavo Int8Dynamic"]()
            times = interleaved(runs, rounds=rounds, seconds=0.1)
            base = times["octavo Int8Dynamic"].median
            for name, taken in times.items():
                per_token = {key: value / DECODED for key, value in milliseconds(taken).items()}
                same = sum(a == b for a, b in zip(runs[name](), expected, strict=True))
                rows.append(
                    {
                        "context": context,
                        "candidate": name,
                        **per_token,
                        "time_over_unfused": taken.median / base,
                        "same_tokens": f"{same} of {DECODED}",
                    }
                )
    return rows
