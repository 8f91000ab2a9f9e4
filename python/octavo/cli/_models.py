# SPDX-License-Identifier: Apache-2.0
"""The language model and the tokenizer that a path holds, for the commands that write with one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


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
