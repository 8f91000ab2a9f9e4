# SPDX-License-Identifier: Apache-2.0
"""A decoder like Llama with random weights, only its Linears swapped: tokens per second, closeness to fp32, memory.

Its weights are heavy-tailed, as those of trained decoders are: Student's t with 4 degrees of freedom. Nothing is
downloaded. `python -m suites.decoder NAME`, run in benchmarks/, says what memory the candidate NAME takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import octavo
from limits.memory import megabytes_of_process
from octavo.runtime.timing import Times, interleaved
from suites.swapped import CONVERSIONS, FLOOR, candidates, megabytes

BENCHMARKS = Path(__file__).resolve().parents[1]
CONTEXT, DECODED = 32, 16  # tokens in the cache before, and tokens decoded by one timed call
PREFILLS = [128, 512]
FORCED = 256  # tokens whose logits are compared
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}


def fill_heavy_tailed(weight: torch.Tensor, scale: float, generator: torch.Generator) -> None:
    """Student's t with 4 degrees of freedom, its variance brought from 2 to scale squared: a normal over the root of
    half the sum of two exponentials."""
    for rows in weight.split(1024):  # so that making the model takes hardly more memory than the model has
        spread = torch.empty_like(rows).exponential_(generator=generator)
        spread += torch.empty_like(rows).exponential_(generator=generator)
        rows.normal_(generator=generator).mul_(scale).div_(spread.sqrt_())


@torch.no_grad()
def decoder(seed: int = 0) -> nn.Module:
    """float32, in eval mode. Each Linear keeps the variance of its input, so that every layer counts."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fill_heavy_tailed(module.weight, module.in_features**-0.5, generator)
        elif isinstance(module, nn.Embedding):
            fill_heavy_tailed(module.weight, 1.0, generator)
    return model.eval().requires_grad_(False)


def random_tokens(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (1, count), generator=generator)


class Decoding:
    """Each call decodes DECODED tokens greedily, one at a time, from the same context."""

    def __init__(self, model: Any):
        self.model = model
        self.cache = transformers.DynamicCache(config=model.config)
        logits = model(random_tokens(CONTEXT), cache=self.cache, logits_to_keep=1).logits
        self.first = logits.argmax(-1)

    def __call__(self) -> torch.Tensor:
        decoded = self.cache.get_seq_length() - CONTEXT
        if decoded:
            self.cache.crop(-decoded)
        token = self.first
        for _ in range(DECODED):
            token = self.model(token, cache=self.cache, logits_to_keep=1).logits.argmax(-1)
        return token


def prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, logits_to_keep=1).logits


def linears_alone(model: nn.Module, names: list[str], dtype: torch.dtype) -> Callable[[], None]:
    """All Linears of the model once, one row each: what a token costs without attention, norms and Python between."""
    layers = [model.get_submodule(name) for name in names]
    calls = [partial(layer, torch.randn(1, 1, layer.in_features, dtype=dtype)) for layer in layers]

    def run() -> None:
        for call in calls:
            call()

    return run


def closeness(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Mean cosine of the logits [tokens, vocabulary], and the share of positions with the same most likely token."""
    return {
        "cosine": torch.cosine_similarity(logits, expected, dim=-1).mean().item(),
        "top1_agreement": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def process_memory(name: str, model: nn.Module) -> dict[str, float]:
    """Megabytes of a process that makes the float model, converts it in place and decodes; for a model of ours also
    of one that loads a checkpoint of `model` instead."""
    found = in_a_process(name)
    if name.startswith("octavo"):
        with tempfile.TemporaryDirectory() as folder:
            octavo.save(model, folder)
            found["loaded_peak_mb"] = in_a_process(name, folder)["peak_mb"]
    return found


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "suites.decoder", *arguments]
    return json.loads(
        subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True).stdout
    )


def memory_of(name: str, folder: str = "") -> dict[str, float]:
    """In this process: resident after the imports, at the highest, and after decoding."""
    imports = megabytes_of_process("VmRSS")
    if folder:
        with torch.device("meta"):
            skeleton = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
        model = octavo.load(folder, skeleton)
    else:
        model = CONVERSIONS[name](decoder())
    with torch.inference_mode():
        Decoding(model)()
    resident, peak = megabytes_of_process("VmRSS"), megabytes_of_process("VmHWM")
    return {"imports_mb": imports, "peak_mb": peak, "resident_mb": resident}


def times_of(models: dict[str, nn.Module], rounds: int) -> dict[str, dict[str, Times]]:
    names = [name for name, module in models["torch fp32"].named_modules() if isinstance(module, nn.Linear)]
    timed = {"decode": {name: Decoding(model) for name, model in models.items()}}
    for count in PREFILLS:
        ids = random_tokens(count)
        timed[f"prefill_{count}"] = {name: partial(prefill, model, ids) for name, model in models.items()}
    timed["linears"] = {
        name: linears_alone(model, names, model.dtype) for name, model in models.items() if name != FLOOR
    }
    return {what: interleaved(runs, rounds=rounds, seconds=0.1) for what, runs in timed.items()}


def measure(rounds: int = 9) -> list[dict[str, object]]:
    """One row for each candidate: tokens per second (median), milliseconds per decoded token and of its Linears alone,
    closeness of the logits to fp32's on forced tokens, megabytes."""
    torch.manual_seed(0)
    models = candidates(decoder())
    ids = random_tokens(FORCED)
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        times = times_of(models, rounds)
        expected = models["torch fp32"](ids).logits[0]
        for name, model in models.items():
            token = times["decode"][name].median / DECODED
            row: dict[str, object] = {
                "candidate": name,
                "decode_tokens_per_s": 1 / token,
                "decode_speedup_over_quantize_dynamic": times["decode"]["quantize_dynamic"].median
                / times["decode"][name].median,
                "decode_ms_per_token": token * 1e3,
                "best_ms_per_token": times["decode"][name].best / DECODED * 1e3,
            }
            for count in PREFILLS:
                row[f"prefill_{count}_tokens_per_s"] = count / times[f"prefill_{count}"][name].median
            if name != FLOOR:
                row["linears_ms_per_token"] = times["linears"][name].median * 1e3
                row |= closeness(model(ids).logits[0].float(), expected)
                row |= {"model_mb": megabytes(model), **process_memory(name, model)}
            rows.append(row)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(memory_of(*sys.argv[1:])))
