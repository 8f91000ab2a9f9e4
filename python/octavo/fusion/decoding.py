# SPDX-License-Identifier: Apache-2.0
"""Lets the models of transformers inside the given one write two tokens with their cache, as generation does.

The user's example is a whole text, for which no cache is used. Without this check, a replacement that loses the cache,
or puts a token into a wrong place of it, would be noticed only when somebody reads what the model writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.batches import float_tensors
from ..base.hooks import hooked
from ..nn.fused.attention_call import cache_of, cache_parameter

TOKENS = ("input_ids", "inputs_embeds")
PROMPT, STEPS = 6, 2


@dataclass
class Decoding:
    """A model, and tokens for it: ids [batch, PROMPT + STEPS] or embeddings [batch, PROMPT + STEPS, k].

    outputs   what the model gave for the prompt and for each token after it, before anything was fused
    """

    model: nn.Module
    name: str
    tokens: torch.Tensor
    outputs: list[list[torch.Tensor]] = field(default_factory=list)

    def run(self) -> list[list[torch.Tensor]]:
        """Runs the model on the prompt and then on each token; returns the first float tensor of each output."""
        cache, outputs = None, []
        for part in self.tokens.split([PROMPT, *[1] * STEPS], dim=1):
            given = {self.name: part, cache_parameter(self.model.forward): cache, "use_cache": True}
            with torch.no_grad():
                output = self.model(**given)
            cache = cache_of(output)
            if cache is None:
                raise ValueError("the model gives no cache")
            first = next(float_tensors(output[0]))  # the others are the cache's own, and hidden states
            outputs.append([first.clone()])
        return outputs


def decodings(model: nn.Module, run: Any) -> list[Decoding]:
    """A Decoding for each outermost model that writes with a cache; `run` runs `model` on the example."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return []
    found = [
        module
        for module in model.modules()
        if isinstance(module, transformers.PreTrainedModel) and cache_parameter(module.forward)
    ]
    calls = _first_calls(found, run) if found else {}
    result: list[Decoding] = []
    inside: set[nn.Module] = set()
    for module in found:
        for name, tokens in _tokens(*calls.get(module, ((), {}))):
            decoding = Decoding(module, name, tokens)
            if module not in inside and _runs(decoding):
                inside.update(module.modules())
                result.append(decoding)
    return result


def _first_calls(models: list[nn.Module], run: Any) -> dict[nn.Module, tuple[tuple, dict[str, Any]]]:
    calls: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    with hooked(((module, note) for module in models), before=True):
        run()
    return calls


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tokens) of a call, repeated to the length that is needed. An argument without a name is input_ids."""
    for name in TOKENS:
        given = kwargs.get(name, args[0] if args and name == TOKENS[0] else None)
        if isinstance(given, torch.Tensor) and given.dim() >= 2 and given.shape[1]:
            length = PROMPT + STEPS
            times = [1] * given.dim()
            times[1] = -(-length // given.shape[1])
            yield name, given.repeat(times)[:, :length]


def _runs(decoding: Decoding) -> bool:
    """Whether the model decodes like this before anything is fused; keeps what it gave in `outputs`."""
    try:
        decoding.outputs = decoding.run()
    except Exception:  # a model that wants more than tokens, or cannot write with a cache
        return False
    return True
