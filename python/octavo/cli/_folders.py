# SPDX-License-Identifier: Apache-2.0
"""What commands that compare a quantized folder with the float one read: both models, a tokenizer and a text."""

from __future__ import annotations

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
