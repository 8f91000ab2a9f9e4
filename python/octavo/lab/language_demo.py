# SPDX-License-Identifier: Apache-2.0
"""A language model, float against few bits: size, divergence from float, speed, and the answer to a plain question.

`run` measures SmolLM2, `measure` any causal language model of transformers; `str` of the result is what
`octavo demo --model smollm2` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.progress import with_bar
from ..base.tables import Table, Tables, megabytes, percent
from ..conversion.convert import quantized
from ..evaluation import Prompts, bits_per_weight
from ..evaluation.comparison import model_bytes
from ..evaluation.generation import generate
from ..evaluation.resources import decoding_speeds
from ..huggingface.smollm2 import load_smollm2
from ..metrics import Distribution, DistributionAccumulator
from ..runtime.timing import interleaved, machine, torch_threads
from ..schemes import Scheme, label
from ..schemes.int4_weight_only import Int4WeightOnly
from ..schemes.int8_dynamic import Int8Dynamic
from ..schemes.nf4 import NF4
from .demo_data import documentation_windows

SCHEMES: tuple[Scheme, ...] = (Int8Dynamic(group_size=32), Int4WeightOnly(), NF4())
QUESTION = "What is the capital of France?"
NAME = "SmolLM2-135M-Instruct"
ORIGIN = "its weights had been rounded to 4 bits, in groups of 32 with a minimum, before they came here"
BATCH = 4  # windows of one forward pass: their logits over a vocabulary of 49,152 take 100 MB


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    windows, context   of documentation text, on which distributions are compared
    new_tokens         of the answer, at most
    rounds             timed calls on one window, the models taking turns
    """

    windows: int = 24
    context: int = 128
    new_tokens: int = 32
    rounds: int = 5


@dataclass(frozen=True)
class LanguageRow:
    """One model's figures.

    scheme                                      what `Scheme.to_dict` says; empty for the float model
    bytes, bits_per_weight                      of the whole model; of its linear layers, scales included
    kld, kld_standard_error, top1_agreement     against the float model: nats for each token, a share in 0 .. 1
    prefill_, decode_tokens_per_second          one window at once; one token after the other
    answer                                      to the question, greedy
    """

    name: str
    scheme: dict[str, Any]
    bytes: int
    bits_per_weight: float
    kld: float
    kld_standard_error: float
    top1_agreement: float
    answer: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class LanguageResult(Tables):
    """What `run` and `measure` return: a row for the float model, then one for each scheme."""

    MARKS = ("<!-- octavo language model -->", "<!-- end of octavo language model -->")

    model: str
    question: str
    rows: list[LanguageRow]
    settings: dict[str, int]
    machine: dict[str, Any]
    note: str = ""

    def __getitem__(self, name: str) -> LanguageRow:
        return next(row for row in self.rows if row.name == name)

    def tables(self) -> list[Table]:
        """The figures, and the answers."""
        windows, context = self.settings["windows"], self.settings["context"]
        text = f"Python {self.machine['python']}'s documentation"
        title = f"{self.model} on {windows} windows of {context} tokens of {text}"
        answers = Table.of(
            f"The answer to: {self.question}",
            {"answer": lambda row: row.answer},
            self.rows,
            words=("answer",),
        )
        return [Table.of(title, _COLUMNS, self.rows), answers]

    @property
    def footer(self) -> str:
        """A line about the machine, and what to know of the model."""
        cpu, isa, threads = (self.machine[name] for name in ("cpu", "active_isa", "threads"))
        where = f"{cpu}, {isa} kernels, torch {self.machine['torch']}, {threads} thread{'s' * (threads > 1)}"
        return f"{where}; {self.note}" if self.note else where

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values: JSON."""
        return asdict(self)


def run(
    schemes: Sequence[Scheme] = SCHEMES,
    *,
    threads: int = 1,
    settings: Settings = Settings(),
    keep_in: str | Path | None = None,
    progress: bool = False,
) -> LanguageResult:
    """Quantizes SmolLM2 with each scheme and measures what that does.

    threads    for torch, restored afterwards
    keep_in    as in `load_smollm2`
    progress   a tqdm bar over the text

    Raises: ImportError that says what to install, if the model's package or what reads it is missing.
    """
    model, tokenizer = load_smollm2(keep_in)
    with torch_threads(threads):
        return measure(
            model, tokenizer, schemes, name=NAME, note=ORIGIN, settings=settings, progress=progress
        )


def measure(
    model: nn.Module,
    tokenizer: Any,
    schemes: Sequence[Scheme],
    *,
    name: str,
    note: str = "",
    settings: Settings = Settings(),
    progress: bool = False,
) -> LanguageResult:
    """Quantizes a float language model of transformers with each scheme and measures what that does.

    name, note   what the tables call the model, and what they say about it
    """
    windows = documentation_windows(tokenizer, settings.windows, settings.context)
    prompt = _prompt(tokenizer, QUESTION)
    by_label = {label(scheme): scheme for scheme in schemes}
    models = {"fp32": model}
    models |= {each: quantized(model, scheme, data=windows[:, :-1]) for each, scheme in by_label.items()}
    first = windows[:1, :-1]
    with torch.inference_mode():
        runs = {each: partial(candidate, first) for each, candidate in models.items()}
        reading = interleaved(runs, rounds=settings.rounds, seconds=0)
        writing = decoding_speeds(models, Prompts(prompt, new_tokens=settings.new_tokens))
        figures = _distributions(models, windows, progress)
    rows = []
    for each, candidate in models.items():
        answer = generate(candidate, prompt, settings.new_tokens, end_token=tokenizer.eos_token_id)[0]
        rows.append(
            LanguageRow(
                name=each,
                scheme=by_label[each].to_dict() if each in by_label else {},
                bytes=model_bytes(candidate),
                bits_per_weight=bits_per_weight(candidate) or 0.0,
                kld=figures[each].kld,
                kld_standard_error=figures[each].kld_standard_error,
                top1_agreement=figures[each].top1_agreement,
                answer=tokenizer.decode(answer, skip_special_tokens=True).strip(),
                prefill_tokens_per_second=settings.context / reading[each].median,
                decode_tokens_per_second=writing[each],
            )
        )
    return LanguageResult(name, QUESTION, rows, asdict(settings), machine(), note)


def _distributions(
    models: dict[str, nn.Module], windows: torch.Tensor, progress: bool
) -> dict[str, Distribution]:
    """Compares every model with "fp32", which runs once for all of them, as `octavo.evaluate` does for one."""
    found = {name: DistributionAccumulator() for name in models}
    for ids in with_bar(windows.split(BATCH), "comparing", "batch", progress):
        expected = models["fp32"](ids[:, :-1]).logits
        for name, model in models.items():
            logits = expected if name == "fp32" else model(ids[:, :-1]).logits
            found[name].update(expected, logits, ids[:, 1:])
    return {name: each.result() for name, each in found.items()}


def _prompt(tokenizer: Any, question: str) -> torch.Tensor:
    """The token ids of the question, int64 [1, tokens], as a chat if the tokenizer has a template for one."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(question)["input_ids"]])
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return torch.tensor([ids])


# Columns of the table: title and cell.
_COLUMNS: dict[str, Callable[[LanguageRow], str]] = {
    "size": lambda row: megabytes(row.bytes),
    "bits per weight": lambda row: f"{row.bits_per_weight:.2f}",
    "KL divergence": lambda row: f"{row.kld:.4f} ± {row.kld_standard_error:.4f}",
    "top-1": lambda row: percent(row.top1_agreement),
    "tokens/s read": lambda row: f"{row.prefill_tokens_per_second:.0f}",
    "written": lambda row: f"{row.decode_tokens_per_second:.1f}",
}
