# SPDX-License-Identifier: Apache-2.0
"""config.json of a transformers folder: what the model is and, in one entry, how its weights are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .disk import current, read_json

CONFIG, ENTRY = "config.json", "quantization_config"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises: FileNotFoundError if there is none; otherwise as `read_json`."""
    path = current(folder, CONFIG)
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a transformers model")
    return read_json(path)


def quantization_entry(folder: Path) -> dict[str, Any] | None:
    """How the weights of `folder` are quantized, as config.json says it; None if there is no such entry, or no file.

    Raises: as `read_json`.
    """
    path = current(folder, CONFIG)
    entry = read_json(path).get(ENTRY) if path.exists() else None
    return entry if isinstance(entry, dict) else None
