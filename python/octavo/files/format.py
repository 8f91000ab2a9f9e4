# SPDX-License-Identifier: Apache-2.0
"""What a file format is, and the list of formats that `load`, `inspect_checkpoint` and `quantize_folder` ask in turn.

A new format is one file in this folder with a class derived from FileFormat, and its name in the list of __init__.py.
A package of somebody else puts an instance into FILE_FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..schemes import Scheme
from .config_json import CONFIG
from .disk import require_regular
from .inspection import CheckpointContents
from .skeleton import skeleton as skeleton_of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Checkpoint:
    """What the files hold, by the names of the float model that was quantized.

    schemes       {layer: its scheme}, of the layers that are quantized
    prepared      {layer: (its scheme, what else it is made of)}, of the layers that are between float and quantized
    tensors       parameters and buffers, by name; several names may mean the same tensor. A quantized
                  layer has the tensors of its weight format
    buffers       values of the buffers that state_dict leaves out; None: the model's classes compute them
    dtypes        {layer: what its weight reads as}, where that is not float32; None: the files do not tell
    source        what errors about a layer blame
    evaluating    whether the model shall be in eval mode
    """

    schemes: dict[str, Scheme]
    tensors: dict[str, torch.Tensor]
    prepared: dict[str, tuple[Scheme, dict[str, Any]]] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] | None = None
    dtypes: dict[str, torch.dtype] | None = None
    source: str = "the checkpoint"
    evaluating: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)


class Stored(NamedTuple):
    """A tensor that still is in its file.

    path   of the file
    meta   what the tensor is, on the meta device
    read   reads it. Raises: ValueError if it is damaged
    """

    path: Path
    meta: torch.Tensor
    read: Callable[[], torch.Tensor]


class FileFormat:
    """How a quantized model, or a float one, lies in files. Instances hold no state.

    description   the files, for the sentence that tells what is read: "a folder of octavo.save"
    loads         whether `read` gives a model, or only ever refuses
    """

    description: ClassVar[str]
    loads: ClassVar[bool] = True

    def recognize(self, path: Path) -> bool:
        """Whether `path`, a folder or a file, is of this format as far as names and first bytes tell.

        Damaged files of the format are recognized, so that reading them says what is wrong. Raises nothing.
        """
        raise NotImplementedError

    def inspect(self, path: Path) -> CheckpointContents:
        """What `path` holds, without reading a tensor. Raises: OSError, ValueError if the files are damaged."""
        raise NotImplementedError

    def read(self, path: Path, skeleton: nn.Module) -> Checkpoint:
        """All that `path` holds, by the names of `skeleton`. Raises: OSError, ValueError if the files are damaged."""
        raise NotImplementedError

    def skeleton(self, path: Path) -> nn.Module:
        """The float model that `path` describes, without weights.

        Here: the one of transformers that config.json names. Raises: FileNotFoundError if there is no description.
        """
        if not (path / CONFIG).exists():
            raise FileNotFoundError(
                f"load: {path} holds no {CONFIG} that says what the model is; give the float model that was quantized, "
                "as skeleton"
            )
        return skeleton_of(path)

    def is_quantized(self, path: Path) -> bool:
        """Whether `path` holds anything but a float model. Raises: OSError, ValueError if the files are damaged."""
        return True

    def catalog(self, path: Path) -> dict[str, Stored]:
        """The tensors of a float model, by the names of the files. Raises: OSError, ValueError for damaged files."""
        raise NotImplementedError

    def write(self, model: nn.Module, folder: Path) -> None:
        """Writes `model` to `folder`. Raises: OSError, ValueError; the folder is then as it was."""
        raise NotImplementedError

    def model_changed(self, model: nn.Module) -> None:
        """Called when layers of `model` have become quantized ones, for what a later save by others needs to know."""


FILE_FORMATS: list[FileFormat] = []  # the first one that recognizes a path reads it


def format_of(path: Path, *, to_load: bool = False) -> FileFormat:
    """The format of `path`.

    to_load   whether the caller wants a model, so that errors list only the formats that give one
    Raises: FileNotFoundError if `path` is missing; ValueError, which says what is read, if it is of no format.
    """
    for found in recognizing(path):
        return found
    raise refusal(path, to_load=to_load)


def recognizing(path: Path) -> Iterator[FileFormat]:
    """The formats that `path` may be of, the most likely one first."""
    return (each for each in FILE_FORMATS if each.recognize(path))


def model_changed(model: nn.Module) -> None:
    """Tells every format that layers of `model` have become quantized ones."""
    for each in FILE_FORMATS:
        each.model_changed(model)


@contextmanager
def errors_naming(function: str) -> Iterator[None]:
    """Puts the name of `function` before the errors about files."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from error
    except OSError as error:
        raise type(error)(f"{function}: {error}") from error


def refusal(path: Path, *, to_load: bool = False) -> Exception:
    """What to raise for a path that holds nothing that is read; `to_load` as in `format_of`."""
    readable = " or ".join(each.description for each in FILE_FORMATS if each.loads or not to_load)
    readable = f"give {readable}"
    if not path.exists() and not path.is_symlink():
        return FileNotFoundError(
            f"{path} does not exist; give a checkpoint's folder, a safetensors file or a GGUF file"
        )
    if path.is_dir():
        others = sorted(each.name for each in path.iterdir() if each.suffix in (*PICKLES, ".gguf"))
        found = f"only {', '.join(others)}; " if others else ""
        return ValueError(f"{path} holds no safetensors file; {found}{_remedy(others[:1]) or readable}")
    require_regular(path)
    return ValueError(f"{path} is not a safetensors file; {_remedy([path.name]) or readable}")


def _remedy(names: list[str]) -> str:
    """What to do with files of other formats; empty if nothing is known of them."""
    kinds = {Path(name).suffix for name in names}
    if kinds & set(PICKLES):
        return "a pickle can run code when it is read: load it with torch and save it with octavo.save or safetensors"
    if ".gguf" in kinds:
        return "a GGUF model is given by its file, the first one if it has several"
    return ""
