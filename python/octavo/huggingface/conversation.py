# SPDX-License-Identifier: Apache-2.0
"""A language model that answers piece by piece, and remembers what was said: what `octavo chat` and `generate` run.

The keys and values of what both sides said stay in one cache, so an answer costs its own tokens and the question's. An
answer is a generator: who stops reading it, or is interrupted, ends it, and the conversation goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from ..nn.fused.attention_call import cache_of, cache_parameter

UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a character


class Conversation:
    """What was said, token by token, and the model's cache of it.

    new_tokens    of an answer, at most
    temperature   0: always the likeliest token; above: drawn, with `seed`
    system        what the model is told first; None: what its template says
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        new_tokens: int = 512,
        temperature: float = 0.0,
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.new_tokens, self.temperature = new_tokens, temperature
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: list[int] = []  # the tokens whose keys and values the cache has
        self.cache: Any = None
        self.tokens, self.seconds = 0, 0.0  # of the last answer

    @property
    def tokens_per_second(self) -> float:
        """Of the last answer: tokens that were written, over the time from the first of them to the last."""
        return max(0, self.tokens - 1) / self.seconds if self.seconds else 0.0

    def ask(self, question: str) -> Iterator[str]:
        """The answer to `question`, piece by piece. What of it was read becomes part of the conversation.

        Raises: ValueError if the tokenizer has no template for conversations.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the model has no chat template, so it was not made for conversations; `octavo generate` "
                "continues a text"
            )
        self.messages.append({"role": "user", "content": question})
        prompt = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True
        )
        said: list[str] = []
        try:
            for piece in self.go_on(prompt["input_ids"]):
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def go_on(self, prompt: list[int]) -> Iterator[str]:
        """What the model writes after the tokens of `prompt`, piece by piece."""
        written: list[int] = []
        shown, self.tokens, self.seconds = 0, 0, 0.0
        ends, started = self._ends(), 0.0
        while len(written) < self.new_tokens:
            token = self._next(prompt + written)
            started = started or time.perf_counter()
            self.tokens, self.seconds = self.tokens + 1, time.perf_counter() - started
            if token in ends:
                return
            written.append(token)
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if len(text) > shown and not text.endswith(UNFINISHED):
                yield text[shown:]
                shown = len(text)

    @torch.inference_mode()
    def _next(self, tokens: list[int]) -> int:
        """The token after `tokens`; what the cache has of them is not computed again."""
        same = 0
        for old, new in zip(self.seen, tokens[:-1], strict=False):
            if old != new:
                break
            same += 1
        if self.cache is None or same == 0:
            self.cache, same = None, 0
        elif same < len(self.seen):
            self.cache.crop(same - len(self.seen))
        ids = torch.tensor([tokens[same:]])
        cache = {cache_parameter(self.model.forward) or "past_key_values": self.cache}
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
        self.cache, self.seen = cache_of(output), list(tokens)
        logits = output.logits[0, -1].float()
        if self.temperature == 0:
            return int(logits.argmax())
        shares = torch.softmax(logits / self.temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=self.generator))

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        config = getattr(self.model, "generation_config", None) or self.model.config
        ends = getattr(config, "eos_token_id", None)
        found = set(ends) if isinstance(ends, list) else {ends}
        return {each for each in (*found, self.tokenizer.eos_token_id) if each is not None}
