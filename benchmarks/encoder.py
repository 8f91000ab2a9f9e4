# SPDX-License-Identifier: Apache-2.0
"""A whole model: all-MiniLM-L6-v2 with only its Linears swapped, against fp32 and quantize_dynamic."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import octavo
from layers import quantize_dynamic
from octavo.demo_data import docstring_sentences
from octavo.pretrained import bundled_folder, load_encoder, unpadded_batches
from octavo.timing import interleaved, page_faults
from timing import figures

SHAPES = [(1, 16), (1, 128), (8, 128)]  # (sentences, tokens)


def mean_cosine(model: nn.Module, reference: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Of the sentence vectors of both, which have length 1."""
    with torch.inference_mode():
        return torch.cat([(model(**batch) * reference(**batch)).sum(-1) for batch in batches]).mean().item()


def measure(rounds: int = 11) -> list[dict[str, object]]:
    """Milliseconds per forward pass of token ids; mean cosine to the float model over 100 real sentences."""
    model, tokenizer = load_encoder(bundled_folder())
    models = {
        "torch fp32": model,
        "quantize_dynamic": quantize_dynamic(model),
        "octavo Int8Dynamic": octavo.quantized(model, octavo.Int8Dynamic()),
        "octavo Int8WeightOnly": octavo.quantized(model, octavo.Int8WeightOnly()),
    }
    batches = unpadded_batches(tokenizer, docstring_sentences())
    cosines = {name: mean_cosine(candidate, model, batches) for name, candidate in models.items()}
    rows = []
    torch.manual_seed(0)
    for sentences, tokens in SHAPES:
        ids = torch.randint(1000, 20000, (sentences, tokens))
        mask = torch.ones_like(ids)
        runs = {
            name: partial(candidate, input_ids=ids, attention_mask=mask) for name, candidate in models.items()
        }
        with torch.inference_mode():
            times = interleaved(runs, rounds=rounds, seconds=0.1)
            faults = {name: page_faults(run) for name, run in runs.items()}
        for name in times:
            rows.append(
                {
                    "sentences": sentences,
                    "tokens": tokens,
                    "candidate": name,
                    **figures(times, name),
                    "cosine": cosines[name],
                    "page_faults": faults[name],
                }
            )
    return rows
