# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that a GGUF file carries, as transformers makes it of a file without tensors."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..skeleton import named_errors, quiet_transformers
from .header import header_bytes
from .parts import GGUFFile


def tokenizer_of(model: GGUFFile) -> Any:
    """transformers' tokenizer of `model`; None if the file has no vocabulary.

    Raises: ValueError for a vocabulary that transformers cannot make a tokenizer of.
    """
    first = model.first
    if "tokenizer.ggml.tokens" not in first.metadata:
        return None
    keys = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    with tempfile.TemporaryDirectory() as folder, quiet_transformers() as transformers:
        name = "vocabulary.gguf"
        Path(folder, name).write_bytes(header_bytes(3, keys, [], first.alignment))
        with named_errors(model.path, "make a tokenizer of its vocabulary"):
            return transformers.PreTrainedTokenizerFast.from_pretrained(
                folder, gguf_file=name, local_files_only=True
            )
