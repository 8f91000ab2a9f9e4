# SPDX-License-Identifier: Apache-2.0
"""A whole model: all-MiniLM-L6-v2 with only its Linears swapped, eager and compiled, against torch's own choices.

A row with mode "compile" exists where torch.compile takes the whole model as one graph. It does not take
quantize_dynamic's: its layers hold script objects, and `graph_breaks` says how often that stops it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from octavo.huggingface.models import bundled_folder, load_encoder, unpadded_batches
from octavo.lab.demo_data import docstring_sentences
from octavo.runtime.timing import interleaved, page_faults
from suites.swapped import FLOOR, candidates
from timing import figures

SHAPES = [(1, 16), (1, 128), (8, 128), (32, 128)]  # (sentences, tokens)
COMPILED = ["torch fp32", "octavo Int8Dynamic", "octavo Int8WeightOnly"]
Batch = dict[str, torch.Tensor]


def mean_cosine(model: Callable[..., Any], reference: nn.Module, batches: list[Batch]) -> float:
    """Of the sentence vectors of both."""
    pairs = [(model(**batch).float(), reference(**batch)) for batch in batches]
    return torch.cat([torch.cosine_similarity(*pair) for pair in pairs]).mean().item()


def graph_breaks(model: nn.Module, batch: Batch) -> int:
    torch.compiler.reset()
    return torch._dynamo.explain(model)(**batch).graph_break_count


def token_ids(sentences: int, tokens: int) -> Batch:
    ids = torch.randint(1000, 20000, (sentences, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def runnables(models: dict[str, nn.Module]) -> dict[tuple[str, str], Callable[..., Any]]:
    """(candidate, mode) and what to call. Compiled with dynamic shapes: one graph for all batches, one for batch 1."""
    found: dict[tuple[str, str], Callable[..., Any]] = {
        (name, "eager"): model for name, model in models.items()
    }
    for name in COMPILED:
        found[name, "compile"] = torch.compile(
            models[name], fullgraph=True, dynamic=True, isolate_recompiles=True
        )
    return found


def measure(rounds: int = 11) -> list[dict[str, object]]:
    """Milliseconds and page faults per forward pass of token ids, graph breaks of torch.compile, and the mean cosine
    to the float model's vectors over 100 real sentences. The faults depend on malloc, see octavo.keep_memory."""
    torch.manual_seed(0)
    model, tokenizer = load_encoder(bundled_folder())
    models = candidates(model)
    batches = unpadded_batches(tokenizer, docstring_sentences())
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        breaks = {name: graph_breaks(candidate, token_ids(2, 16)) for name, candidate in models.items()}
        torch.compiler.reset()
        runs = runnables(models)
        cosines = {key: mean_cosine(run, model, batches) for key, run in runs.items() if key[0] != FLOOR}
        for sentences, tokens in SHAPES:
            batch = token_ids(sentences, tokens)
            calls = {key: partial(run, **batch) for key, run in runs.items()}
            times = interleaved(calls, rounds=rounds, seconds=0.1)
            eager = {name: taken for (name, mode), taken in times.items() if mode == "eager"}
            for (name, mode), taken in times.items():
                rows.append(
                    {
                        "sentences": sentences,
                        "tokens": tokens,
                        "candidate": name,
                        "mode": mode,
                        **figures({**eager, "this": taken}, "this"),
                        "cosine": cosines.get((name, mode)),
                        "page_faults": page_faults(calls[name, mode]),
                        "graph_breaks": breaks[name],
                    }
                )
    return rows
