# SPDX-License-Identifier: Apache-2.0
"""The reference writes, the model follows: both are fed the reference's tokens, and every choice is compared.

Up to the first token that the model would have chosen otherwise, its own greedy completion is the same text; so the
first rejected position is where free-running texts part, and one run gives both figures. Logits are compared as they
come and never kept. A model that offers transformers' cache decodes with it; any other is run on the whole text again
for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.batches import evaluating
from ..metrics import Forced, ForcedAccumulator
from ..nn.fused.attention_call import cache_of, cache_parameter
from .kinds import logits_of

BATCH = 16  # prompts of one length that run together: bounds the logits that exist at once


@dataclass(frozen=True)
class Prompts:
    """The prompts to complete, and how far.

    ids          token ids: a sequence of int64 tensors [length], of lists of int, or one tensor [prompts, length]
    new_tokens   tokens to write after each prompt
    top_n        tokens that the Fireworks method keeps at each position
    end_token    ends a completion where the reference writes it; it still counts
    cache        "auto": decode with the model's cache if its forward takes one, and use_cache;
                 False: run the whole text for each token
    """

    ids: Sequence[Any] | torch.Tensor
    new_tokens: int = 64
    top_n: int = 16
    end_token: int | None = None
    cache: str | bool = "auto"

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.top_n < 1:
            raise ValueError(
                f"Prompts: new_tokens is {self.new_tokens} and top_n {self.top_n}, at least 1 is needed"
            )
        if self.cache not in ("auto", False):
            raise ValueError(f"Prompts: cache is {self.cache!r}, 'auto' or False is needed")
        if isinstance(self.ids, str) or not isinstance(self.ids, Sequence | torch.Tensor):
            raise TypeError(f"Prompts: ids is {type(self.ids).__name__}, a sequence of token ids is needed")

    def tensors(self) -> list[torch.Tensor]:
        """One int64 tensor [length] for each prompt. Raises: ValueError for none, or one that is empty."""
        tensors = [torch.as_tensor(ids) for ids in self.ids]
        for ids in tensors:
            if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) == 0:
                found = f"{ids.dtype} {tuple(ids.shape)}"
                raise ValueError(f"Prompts: a prompt is {found}, int64 [1 or more] is needed")
        if not tensors:
            raise ValueError("Prompts: ids is empty; give at least one prompt")
        return tensors


@dataclass(frozen=True)
class Generation:
    """How a model follows the reference's greedy completions.

    first_differences        for each prompt, the tokens before the first that the model would choose otherwise; the
                             completion's length if there is none. Their mean, and the share of `identical` completions
    prefill                  figures over the prompts' tokens but the last one, whose logits choose the first new token
    generation               figures over the positions that choose each new token
    kld_by_position          full-vocabulary divergence at the first, second, ... new token; rejection_by_position alike
    """

    prompts: int
    new_tokens: int
    mean_first_difference: float
    identical: float
    prefill: Forced
    generation: Forced
    first_differences: list[int] = field(repr=False)
    kld_by_position: list[float] = field(repr=False)
    rejection_by_position: list[float] = field(repr=False)

    def plot(self, ax: Any = None) -> Any:
        """Draws the divergence at each new token on `ax` or a new figure; returns the Axes. Nothing is shown.

        Raises: ImportError if matplotlib is missing.
        """
        from .plots import plot_generation

        return plot_generation(self, ax)


def evaluate_generation(
    reference: nn.Module, model: nn.Module, prompts: Prompts | Sequence[Any] | torch.Tensor
) -> Generation:
    """Runs both models along the reference's greedy completions of `prompts`; returns how the model follows.

    Raises: TypeError, ValueError for prompts that are none; TypeError if an output holds no logits.
    Source: Fireworks AI 2024; docs/numerics.md, eq. 23 to 25.
    """
    prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
    follower = _Follower(prompts)
    with torch.no_grad(), evaluating(reference, model):
        for indices, ids in _groups(prompts.tensors()):
            follower.follow(indices, Decoder(reference, prompts.cache), Decoder(model, prompts.cache), ids)
    return follower.result()


def generate(
    model: nn.Module,
    ids: torch.Tensor,
    new_tokens: int = 64,
    *,
    end_token: int | None = None,
    cache: str | bool = "auto",
) -> torch.Tensor:
    """The greedy completion of prompts of one length: int64 [batch, length] to [batch, new_tokens or fewer].

    Stops early when every row has written end_token; what a row holds after its own means nothing.
    """
    with torch.no_grad(), evaluating(model):
        decoder = Decoder(model, cache)
        tokens = [decoder.start(ids)[:, -1].argmax(-1)]
        ended = tokens[0] == _token(end_token)
        while len(tokens) < new_tokens and not ended.all():
            tokens.append(decoder.step(tokens[-1]).argmax(-1))
            ended |= tokens[-1] == _token(end_token)
    return torch.stack(tokens, dim=1)


class Decoder:
    """One model reading a text token by token."""

    def __init__(self, model: nn.Module, cache: str | bool = "auto") -> None:
        self.model = model
        self.past: Any = None
        self._cached = cache == "auto" and offers_cache(model)
        self._text = torch.empty(0)

    def start(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] of the prompts int64 [batch, length]."""
        self._text = ids
        return self._run(ids)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] after one more token int64 [batch]."""
        tokens = tokens[:, None]
        if self.past is not None:
            return self._run(tokens)[:, -1]
        self._text = torch.cat([self._text, tokens], dim=1)
        return self._run(self._text)[:, -1]

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        if not self._cached:
            return logits_of(self.model(ids))
        given = {cache_parameter(self.model.forward): self.past}
        output = self.model(ids, use_cache=True, **given)
        self.past = cache_of(output)
        return logits_of(output)


def offers_cache(model: nn.Module) -> bool:
    """Whether forward takes transformers' cache."""
    takes_flag = "use_cache" in inspect.signature(model.forward).parameters
    return takes_flag and cache_parameter(model.forward) != ""


class _Follower:
    """Collects the figures of each prompt, token by token."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.prefill, self.generation = ForcedAccumulator(prompts.top_n), ForcedAccumulator(prompts.top_n)
        self.positions: list[torch.Tensor] = []  # of each entry of `generation`
        self.first: dict[int, int] = {}  # by prompt
        self.identical: dict[int, bool] = {}

    def follow(self, indices: list[int], reference: Decoder, model: Decoder, ids: torch.Tensor) -> None:
        x, y = reference.start(ids), model.start(ids)
        self.prefill.update(x[:, :-1], y[:, :-1])
        x, y = x[:, -1], y[:, -1]
        writing, agreeing = (torch.ones(len(ids), dtype=torch.bool) for _ in range(2))
        first = torch.zeros(len(ids), dtype=torch.int64)
        for position in range(self.prompts.new_tokens):
            self.generation.update(x, y, mask=writing)
            self.positions.append(torch.full((int(writing.sum()),), position))
            tokens = x.argmax(-1)
            agreeing &= (y.argmax(-1) == tokens) | ~writing
            first += agreeing & writing
            writing = writing & (tokens != _token(self.prompts.end_token))
            if position + 1 == self.prompts.new_tokens or not writing.any():
                break
            x, y = reference.step(tokens), model.step(tokens)
        self.first.update(zip(indices, first.tolist(), strict=True))
        self.identical.update(zip(indices, agreeing.tolist(), strict=True))

    def result(self) -> Generation:
        first = [self.first[i] for i in sorted(self.first)]
        return Generation(
            prompts=len(first),
            new_tokens=self.prompts.new_tokens,
            mean_first_difference=sum(first) / len(first),
            identical=sum(self.identical.values()) / len(first),
            prefill=self.prefill.result(),
            generation=self.generation.result(),
            first_differences=first,
            kld_by_position=self._by_position(self.generation.klds()),
            rejection_by_position=self._by_position(self.generation.rejections()),
        )

    def _by_position(self, values: torch.Tensor) -> list[float]:
        positions = torch.cat(self.positions)
        total = torch.zeros(int(positions.max()) + 1, dtype=torch.float64).index_add_(0, positions, values)
        return (total / positions.bincount()).tolist()


def _token(end_token: int | None) -> int:
    return -1 if end_token is None else end_token  # no token is -1


def _groups(prompts: list[torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Groups of prompts of one length, with their numbers in the list, so that no padding is needed."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), BATCH):
            some = indices[start : start + BATCH]
            yield some, torch.stack([prompts[index] for index in some])
