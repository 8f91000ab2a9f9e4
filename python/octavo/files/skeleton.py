# SPDX-License-Identifier: Apache-2.0
"""The model that a folder's config.json describes, without weights: what a quantized folder is read into.

transformers is imported only when something here is called. Whatever it raises at a config.json that it cannot use
becomes one sentence with the file's name, because people edit such files by hand.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..base.float_types import FLOAT_DTYPES
from .config_json import CONFIG, read_config
from .disk import current

# Fields that count or measure something: transformers takes a negative number of layers for none and says nothing.
_COUNTS = re.compile(
    r"(^|_)(layers|heads|experts|blocks|groups|n_layer|n_head|n_embd|d_model|d_ff|ffn_dim|head_dim)$"
    r"|(hidden|intermediate|vocab|embedding)_size$"
)

_DRAWING = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "zero_", "zeros_", "fill_", "ones_")


def skeleton(folder: str | Path) -> nn.Module:
    """The float model of `folder` in eval mode, its weights on the meta device, its buffers filled.

    Raises: FileNotFoundError if folder holds no config.json; ImportError if transformers is missing; ValueError if
    transformers has no such class, if only code of the folder's own could make it, or if a field is wrong.
    """
    with quiet_transformers() as transformers:
        kind, config = model_class(transformers, Path(folder))
    return without_weights(kind, config, Path(folder) / CONFIG)


def without_weights(kind: Any, config: Any, source: Path, **options: Any) -> nn.Module:
    """A model of class `kind` in eval mode, its weights on the meta device, its buffers filled.

    source    the file that errors name
    options   for the class
    Raises: ValueError if the class cannot be made with this config.
    """
    default = torch.get_default_dtype()
    with quiet_transformers(), named_errors(source, "make a model of it"):
        try:
            torch.set_default_dtype(config.dtype if config.dtype in FLOAT_DTYPES else default)
            with _WeightsOnMeta():
                return kind(config, **options).eval()
        finally:
            torch.set_default_dtype(default)


def model_class(transformers: Any, folder: Path) -> tuple[Any, Any]:
    """The model's class and its config. Code that lies in the folder is not run. Raises: as `skeleton`."""
    architectures = read_config(folder).get("architectures")
    with named_errors(folder / CONFIG, "read it"):
        config = transformers.AutoConfig.from_pretrained(
            current(folder, CONFIG).parent, local_files_only=True, trust_remote_code=False
        )
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kind = getattr(transformers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"{folder / CONFIG} gives the model's class as {name!r}, which transformers {transformers.__version__} "
            "does not have: `architectures` must name one, a newer transformers may have it"
        )
    for field, value in _wrong_counts(config.to_dict()):
        raise ValueError(f"{folder / CONFIG}: {field} is {value!r}, a number of 0 or more is needed")
    return kind, config


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers without progress bars and talk of them."""
    try:
        with warnings.catch_warnings():
            # tqdm's, in notebooks without ipywidgets: there are no bars here to be shown without them
            warnings.filterwarnings("ignore", message="IProgress not found")
            import transformers
            from transformers.utils import logging
    except ImportError as error:
        raise ImportError("this needs transformers: pip install transformers") from error
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if shown:
            logging.enable_progress_bar()


class _WeightsOnMeta(TorchFunctionMode):
    """torch.empty, of which layers make their weights, gives tensors without memory; buffers are computed as usual.

    Nothing is drawn for weights without memory: that took torch a millisecond each.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        drawn = args[0] if args else kwargs.get("tensor")  # the name that torch.nn.init has for it
        if getattr(func, "__name__", "") in _DRAWING and getattr(drawn, "is_meta", False):
            return drawn
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def named_errors(path: Path, attempt: str) -> Iterator[None]:
    """Errors of transformers, of whatever kind, as a ValueError of one line with the file's name."""
    try:
        yield
    except (ImportError, MemoryError):  # about this machine, not about the file
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: transformers cannot {attempt}: {reason}") from error


def tie_weights_on_meta_(model: nn.Module) -> None:
    """Ties what the classes of transformers in `model` tie, as far as it has no values yet.

    Some versions of transformers, 5.0 among them, do not tie the weights of a model that is made on the meta device.
    """
    for part in model.modules():
        for target, source in getattr(part, "all_tied_weights_keys", {}).items():
            owner, _, name = target.rpartition(".")
            tensors = part.get_submodule(owner)._parameters
            shared = part.get_submodule(source.rpartition(".")[0])._parameters.get(source.rpartition(".")[2])
            if shared is not None and shared.is_meta and getattr(tensors.get(name), "is_meta", False):
                tensors[name] = shared


def _wrong_counts(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _wrong_counts(value, f"{prefix}{name}.")
        elif _COUNTS.search(str(name)) and (isinstance(value, str) or (type(value) is int and value < 0)):
            yield prefix + name, value
