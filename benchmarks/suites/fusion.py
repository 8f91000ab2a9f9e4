# SPDX-License-Identifier: Apache-2.0
"""Whole models after octavo.fuse_: MiniLM with its weights, BERT base and ViT base with random ones, against torch's
quantize_dynamic and OpenVINO's static int8 (if it is installed), all in one process.

Encoders only; decoding.py has a decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

import octavo
import rivals
from octavo.huggingface.models import bundled_folder, load_encoder, unpadded_batches
from octavo.lab.bench import quantize_dynamic_
from octavo.lab.demo_data import docstring_sentences
from octavo.runtime.timing import interleaved, page_faults
from rivals import openvino
from timing import milliseconds

Batch = dict[str, torch.Tensor]
Encoder = Callable[..., torch.Tensor]


class TextEncoder(nn.Module):
    """The last hidden state of a transformers model of text, with arguments that a tracer can see."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class ImageEncoder(nn.Module):
    """The same of images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state


def token_ids(sentences: int, tokens: int) -> Batch:
    ids = torch.randint(1000, 20000, (sentences, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(count: int) -> Batch:
    return {"pixel_values": torch.randn(count, 3, 224, 224)}


def minilm() -> tuple[nn.Module, list[Batch], list[Batch]]:
    """The model, real batches to calibrate and compare on, and batches to time."""
    model, tokenizer = load_encoder(bundled_folder())
    shapes = [(1, 16), (1, 128), (8, 128), (32, 128)]
    return model, unpadded_batches(tokenizer, docstring_sentences()), [token_ids(*shape) for shape in shapes]


def bert_base() -> tuple[nn.Module, list[Batch], list[Batch]]:
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    return TextEncoder(model).eval(), [token_ids(2, 64) for _ in range(4)], [token_ids(8, 128)]


def vit_base() -> tuple[nn.Module, list[Batch], list[Batch]]:
    model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    return ImageEncoder(model).eval(), [images(2) for _ in range(4)], [images(8)]


MODELS = {"MiniLM": minilm, "BERT base": bert_base, "ViT base": vit_base}


def fused(model: nn.Module, batches: list[Batch], **options: Any) -> nn.Module:
    model = copy.deepcopy(model)
    octavo.fuse_(model, batches[:2], **options)
    return model


def candidates(model: nn.Module, batches: list[Batch]) -> dict[str, Encoder]:
    quantized = octavo.quantized(model, octavo.Int8Dynamic())
    found: dict[str, Encoder] = {
        "torch fp32": model,
        "quantize_dynamic": quantize_dynamic_(copy.deepcopy(model)),
        "octavo Int8Dynamic": quantized,
        "octavo fp32, fused": fused(model, batches),
        "octavo Int8Dynamic, fused, float32 attention": fused(quantized, batches, attention="float32"),
        "octavo Int8Dynamic, fused": fused(quantized, batches),
        "octavo Int8Dynamic, fused with blocks": fused(quantized, batches, blocks=True),
    }
    if all(rivals.is_installed(package) for package in openvino.REQUIRES):
        found["openvino static"] = openvino.static_model(model, batches)
    return found


def mean_cosine(run: Encoder, reference: nn.Module, batches: list[Batch]) -> float:
    """Of the vectors that both give on the batches."""
    cosines = [torch.cosine_similarity(run(**batch).float(), reference(**batch), dim=-1) for batch in batches]
    return torch.cat([cosine.flatten() for cosine in cosines]).mean().item()


def size_of(batch: Batch) -> str:
    shape = next(iter(batch.values())).shape
    return f"{shape[0]} x {shape[1]} tokens" if len(shape) == 2 else f"{shape[0]} images"


def measure(rounds: int = 9) -> list[dict[str, object]]:
    """Milliseconds and page faults of a forward pass, its time over those of two rivals, the mean cosine to fp32."""
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for name, make in MODELS.items():
            model, real, timed = make()
            runs = candidates(model, real)
            cosines = {key: mean_cosine(run, model, real) for key, run in runs.items()}
            for batch in timed:
                calls = {key: partial(run, **batch) for key, run in runs.items()}
                times = interleaved(calls, rounds=rounds, seconds=0.1)
                for key, taken in times.items():
                    over = {
                        f"time_over_{rival.replace(' ', '_')}": taken.median / times[rival].median
                        for rival in ("quantize_dynamic", "openvino static")
                        if rival in times
                    }
                    rows.append(
                        {
                            "model": name,
                            "size": size_of(batch),
                            "candidate": key,
                            **milliseconds(taken),
                            **over,
                            "cosine": cosines[key],
                            "page_faults": page_faults(calls[key]),
                        }
                    )
    return rows
