# SPDX-License-Identifier: Apache-2.0
"""`octavo.load_gguf`: a GGUF file as a model of transformers whose layers compute with the blocks of the file."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..disk import folder_argument
from ..format import errors_naming, model_changed, refusal
from ..loading import fill
from .checkpoint import checkpoint_of
from .config import gguf_skeleton
from .header import is_gguf
from .parts import read_gguf
from .tokenizer import tokenizer_of


@torch.inference_mode(False)  # inference tensors could take no part in training later
def load_gguf(
    path: str | os.PathLike[str],
    tokenizer: bool = True,
    *,
    activations: str = "int8",
    as_floats: bool = False,
) -> tuple[Any, Any]:
    """The model in a GGUF file, in eval mode, and its tokenizer.

    path          of the file, or of the first one of a model in several, `...-00001-of-00003.gguf`
    tokenizer     whether to make the tokenizer, which takes longer than the model; without one, and for files that have
                  no vocabulary, the second value is None
    activations   what products read of their inputs: "int8" or "int16", as octavo.GGML takes it
    as_floats     decodes every block to float32: a float model, to be compared with or quantized in another way

    Matrices are QuantLinear with the blocks of the file, packed layer by layer out of the mapped file: no float copy
    ever exists. What became float all the same stands in `print(model.gguf_origin)`, with the reasons.
    Opened are the architectures llama (mistral too), qwen2, qwen3, qwen2moe, qwen3moe, gemma, gemma2, gemma3, phi3,
    gpt2, falcon, starcoder2 and bert, of versions 2 and 3 of GGUF.

    Raises: FileNotFoundError, PermissionError; ValueError for a file that is damaged, of another architecture, or of
    another format; ImportError if transformers or gguf is missing.
    Source: ours; names and configs by the tables of transformers and gguf.
    """
    path = folder_argument("load_gguf", path)
    with errors_naming("load_gguf"):
        if not is_gguf(path):
            raise refusal(path, to_load=True)
        source = read_gguf(path)
        skeleton = gguf_skeleton(source, as_floats)
        model: Any = fill(skeleton, checkpoint_of(source, skeleton, activations, as_floats))
        model_changed(model)
        return model, tokenizer_of(source) if tokenizer else None
