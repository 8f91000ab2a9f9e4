# SPDX-License-Identifier: Apache-2.0
"""The files in a model's folder that hold no weights of it: which of them are copied into a quantized folder.

Tokenizers have files of any name (source.spm, bpe.codes), and a folder may hold more modules in subfolders, as those of
sentence-transformers do. So everything is copied but for a few kinds, and each of these is reported with its reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import safetensors
from ..files.format import PICKLES

# Other formats of the same weights, or what a training leaves behind: large files of floats.
OTHER_FORMATS = {
    *(".h5", ".msgpack", ".npz", ".ot"),
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".pb", ".mlmodel"),
    *PICKLES,
}
CODE = {".py", ".pyc", ".so", ".sh"}
# These are written anew, or belong to octavo.save: beside new weights they would be taken for theirs.
WRITTEN, STALE = {"config.json", safetensors.INDEX}, {"octavo.json", "buffers.safetensors"}
MODULES = "modules.json"  # where sentence-transformers lists the parts of a model


def copy_others(source: Path, folder: Path, read: set[Path]) -> dict[str, str]:
    """Copies from `source` to `folder` what is neither in `read`, its files of weights, nor left out for a reason.

    Returns {name relative to `source`: reason} of what was left out. Nothing that `folder` holds, which may lie in
    `source`, is looked at. Raises: OSError if a file or a folder cannot be read.
    """
    modules, left_out = _modules(source), {}
    for path in _paths(source, folder):
        name = PurePosixPath(path.relative_to(source).as_posix())
        if path in read or str(name) in WRITTEN:
            continue
        reason = _reason_to_leave(path, name, modules)
        if reason:
            left_out[str(name)] = reason
        elif path.is_dir():
            (folder / name).mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, folder / name)
    return left_out


def _paths(source: Path, folder: Path) -> Iterator[Path]:
    """Files and folders, each folder before its contents; what is left out as a whole is not looked into."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(source, onerror=fail):
        inside = [Path(place, name) for name in sorted(folders)]
        inside = [path for path in inside if path.resolve() != folder.resolve()]
        yield from inside
        yield from (Path(place, name) for name in sorted(files))
        folders[:] = [path.name for path in inside if not _reason_for_folder(path)]


def _reason_to_leave(path: Path, name: PurePosixPath, modules: set[str]) -> str | None:
    if path.is_dir():
        return _reason_for_folder(path)
    if not path.is_file():
        return "no regular file"
    if path.name.startswith("."):
        return "hidden"
    if path.suffix in CODE:
        return "code"
    if str(name) in STALE:
        return "of another checkpoint"
    weights = PurePosixPath(path.name.removesuffix(".index.json"))
    if weights.suffix in OTHER_FORMATS and not modules.intersection(map(str, name.parents)):
        return "weights in another format"
    if weights.suffix == ".safetensors" and len(name.parts) == 1:
        return "weights that the model is not loaded from"
    return None


def _reason_for_folder(path: Path) -> str | None:
    if path.is_symlink():
        return "no regular file"
    if path.name.startswith("."):
        return "hidden"
    return "a step of training" if re.fullmatch(r"checkpoint-\d+", path.name) else None


def _modules(source: Path) -> set[str]:
    """Folders that are parts of the model: there, weights in any format belong to it."""
    if not (source / MODULES).is_file():
        return set()
    try:
        modules: Any = json.loads((source / MODULES).read_text(encoding="utf-8"))
        return {part["path"] for part in modules if part.get("path")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()  # not sentence-transformers' file
