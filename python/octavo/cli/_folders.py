# SPDX-License-Identifier: Apache-2.0
"""What commands read: models and tokenizers in folders and GGUF files, and texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text in a file. Raises: OSError if it cannot be read, ValueError if it is no UTF-8 or holds nothing."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def load_models(reference_folder: Path, quantized_folder: Path) -> tuple[Any, Any, Any]:
    """The float model, the quantized one and the tokenizer. Raises: ValueError if they are not what they should be."""
    from octavo.huggingface.models import load_model, load_quantized, load_tokenizer

    quantized = [_is_quantized(folder) for folder in (reference_folder, quantized_folder)]
    if quantized == [True, False]:
        raise ValueError(
            f"{reference_folder} is quantized and {quantized_folder} is not; give the float folder first"
        )
    if quantized[0]:
        raise ValueError(f"{reference_folder} is quantized; give the folder of its float model first")
    if not quantized[1]:
        raise ValueError(
            f"{quantized_folder} has no quantization_config, so it holds a float model; `octavo quantize "
            f"{quantized_folder} OUTPUT` writes a quantized one"
        )
    return load_model(reference_folder), load_quantized(quantized_folder), load_tokenizer(reference_folder)


def _is_quantized(folder: Path) -> bool:
    from octavo.files import format_of
    from octavo.files.config_json import read_config

    read_config(folder)  # without which there is no float model to compare with
    return format_of(folder).is_quantized(folder)


def conversation(options: argparse.Namespace) -> Any:
    """The model of `options.model`, ready to answer. Raises: ValueError if it is no language model with a tokenizer."""
    import torch

    from octavo.huggingface.conversation import Conversation

    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = open_model(options.model, options.activations)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no vocabulary, so text cannot become tokens")
    if not hasattr(model, "lm_head") and not model.can_generate():
        raise ValueError(f"{options.model} is a {type(model).__name__}, which writes no text")
    return Conversation(
        model,
        tokenizer,
        new_tokens=options.tokens,
        temperature=options.temperature,
        system=getattr(options, "system", None),
    )


def open_model(path: Path, activations: str = "int8") -> tuple[Any, Any]:
    """The model and the tokenizer in a GGUF file, or in a folder of transformers, quantized or not.

    activations   what the layers of a GGUF file read of their inputs; a folder says that itself
    """
    from octavo.files import format_of, load_gguf
    from octavo.files.gguf.header import is_gguf
    from octavo.huggingface.models import load_model, load_quantized, load_tokenizer

    if is_gguf(path):
        return load_gguf(path, activations=activations)
    model = load_quantized(path) if format_of(path).is_quantized(path) else load_model(path)
    return model, load_tokenizer(path)
