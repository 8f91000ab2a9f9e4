# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors files: one file, or shards that an index lists. Nothing is ever unpickled.

Such files as a format of their own are float models, which are quantized, and quantized models of other packages, which
are inspected. The formats that octavo loads keep their tensors in such files, too, and read them with what is here.

Reading believes no file: only regular ones are opened, what an index says must be what the shards hold, and where a
file carries checksums (ours do) every tensor must have its own. Writing needs one tensor in memory at a time, because
all names, dtypes and shapes are known beforehand; the header comes last, so that a file that was not finished has none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import foreign
from .config_json import CONFIG, ENTRY, quantization_entry, read_config
from .disk import current, parse_json, read_json, require_regular
from .format import PICKLES, Checkpoint, FileFormat, Stored, refusal
from .inspection import CheckpointContents, Entry, contents_of

WEIGHTS, INDEX, SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Safetensors(FileFormat):
    """A file, or a folder: any of transformers, and those without config.json that hold such files."""

    description: ClassVar[str] = "a file of safetensors, or the folder it came in"
    loads: ClassVar[bool] = False

    def recognize(self, path: Path) -> bool:
        if not path.is_dir():
            return os.path.lexists(path) and (path.suffix == SUFFIX or _has_header(path))
        names = (current(path, CONFIG), current(path, WEIGHTS), path / INDEX, *path.glob(f"*{SUFFIX}"))
        return any(map(os.path.lexists, names))

    def inspect(self, path: Path) -> CheckpointContents:
        return contents(path)

    def read(self, path: Path, skeleton: nn.Module) -> Checkpoint:
        raise _not_loaded(path)

    def skeleton(self, path: Path) -> nn.Module:
        raise _not_loaded(path)

    def is_quantized(self, path: Path) -> bool:
        return path.is_dir() and current(path, CONFIG).exists() and ENTRY in read_config(path)

    def catalog(self, path: Path) -> dict[str, Stored]:
        return catalog(path)


def _not_loaded(path: Path) -> Exception:
    """Why `load` cannot read a path of this format."""
    if not (path / CONFIG).exists():
        return FileNotFoundError(
            f"load: {path} holds neither octavo.json nor {CONFIG}; give a folder written by octavo.save"
        )
    entry = quantization_entry(path)
    if entry is None:
        return ValueError(f"load: {path / CONFIG} has no {ENTRY}; give a quantized folder")
    return ValueError(f"load: quant_method is {entry.get('quant_method')!r}; octavo reads compressed-tensors")


def contents(path: Path) -> CheckpointContents:
    """What a file or a folder holds, of whatever package. Raises: as `header` and `weight_map`."""
    if not path.is_dir():
        return contents_of(path, "safetensors", [path], foreign.rows(header(path), {}))
    paths = files(path)
    tensors = {name: entry for file in paths for name, entry in header(file).items()}
    rows = foreign.rows(tensors, quantization_entry(path) or {})
    name = "transformers" if (path / CONFIG).exists() else "safetensors"
    return contents_of(path, name, paths, rows)


def catalog(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, by name; headers are read, no values.

    Raises: FileNotFoundError if a file is missing, ValueError if one is damaged, foreign or contradicts the index.
    """
    found: dict[str, Stored] = {}
    index = weight_map(folder)
    for path in _files(folder, index):
        with _opened(path) as file:
            for name in file.keys():
                if name in found:
                    raise ValueError(
                        f"{path}: {name!r} is in {found[name].path.name}, too; damaged checkpoint"
                    )
                if index is not None and index.get(name) != path.name:
                    raise ValueError(
                        f"{path}: {INDEX} does not say that {name!r} is here; damaged checkpoint"
                    )
                meta = _meta(path, name, file.get_slice(name))
                found[name] = Stored(path, meta, partial(read_tensor, path, name))
    if index is not None and index.keys() - found.keys():
        lost = min(index.keys() - found.keys())
        raise ValueError(f"{folder / INDEX}: {lost!r} is not in {index[lost]}; damaged checkpoint")
    return found


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor, mapped from its file: its memory is given back with the tensor. Raises: as `read_file`."""
    with _opened(path) as file:
        return _checked(file, name, _checksums(file, path), path)


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped from it.

    Raises: FileNotFoundError if it is missing, ValueError if it is damaged or no safetensors file.
    """
    with _opened(path) as file:
        checksums = _checksums(file, path)
        return {name: _checked(file, name, checksums, path) for name in file.keys()}


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, mapped from its files. Raises: as `catalog`."""
    stored = catalog(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted({entry.path for entry in stored.values()}):
        tensors.update(read_file(path))
    return tensors


def weight_map(folder: Path) -> dict[str, str] | None:
    """{name: file} of the folder's index, or None if one file holds everything.

    Raises: ValueError if the index is damaged or names anything but safetensors files of the same folder.
    """
    path = folder / INDEX
    if current(folder, WEIGHTS).exists() or not path.exists():
        return None
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(f"{path} is not an index of safetensors files: weight_map is {type(index).__name__}")
    for name in index.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIX):
            raise ValueError(f"{path} names {name!r}; only safetensors files of the same folder are read")
    return index


def require_files(folder: Path) -> None:
    """For a folder that another package is going to read. Raises: as `catalog`, but for what the files hold."""
    for path in _files(folder, weight_map(folder)):
        require_regular(path)


def files(folder: Path) -> list[Path]:
    """The files to inspect: the model's files, or all files if none has the name that a model's file has.

    Raises: as `weight_map`.
    """
    index = weight_map(folder)
    if index is not None or current(folder, WEIGHTS).exists():
        return _files(folder, index)
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if not found:
        raise refusal(folder)
    return found


def header(path: Path) -> dict[str, Entry]:
    """What the file says of its tensors, by name, also of dtypes that octavo does not read. Raises: as `read_file`."""
    with _opened(path):  # checks the header, and the file's length against it
        pass
    entries = json.loads(_header_bytes(path))
    entries.pop("__metadata__", None)
    return {
        name: Entry(
            entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in entries.items()
    }


def fingerprint(path: Path) -> str:
    """Of the header, which holds the checksums of all tensors: another file has another one. Raises: as `read_file`."""
    with _opened(path):
        return f"{zlib.crc32(_header_bytes(path)):08x}"


def write(
    path: Path, layout: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes `tensors`, pairs (name, tensor) in any order. `layout` has the same names; its tensors may be on meta.

    Raises: ValueError if a tensor is not as in `layout`, or missing; the file then has no header.
    Source: the safetensors format; checksums are ours, in its metadata.
    """
    entries, checksums = _entries(layout), dict.fromkeys(layout, 0)
    start, left = len(_header(entries, checksums)), set(layout)
    with open(path, "wb") as file:
        for name, tensor in tensors:
            expected = layout[name]
            if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
                raise ValueError(f"write: {name!r} is {tensor.dtype} {list(tensor.shape)}, not as laid out")
            file.seek(start + entries[name]["data_offsets"][0])
            file.write(_bytes(tensor))
            checksums[name] = checksum(tensor)
            left.discard(name)
            del tensor  # before the next one is made
        if left:
            raise ValueError(f"write: {min(left)!r} was laid out and never came")
        file.seek(0)
        file.write(_header(entries, checksums))
        file.flush()
        os.fsync(file.fileno())  # before a rename makes the folder look whole


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of dtype, shape and bytes, so that no one of them can change unseen."""
    return zlib.crc32(_bytes(tensor), zlib.crc32(f"{_NAMES[tensor.dtype]} {list(tensor.shape)}".encode()))


def nbytes(layout: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in layout.values())


# Reading


def _files(folder: Path, index: dict[str, str] | None) -> list[Path]:
    """The files that transformers loads the model of `folder` from."""
    if index is not None:
        return [folder / name for name in sorted(set(index.values()))]
    weights = current(folder, WEIGHTS)
    pickles = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
    if pickles and not weights.exists():
        raise ValueError(
            f"{folder} holds {min(pickles)} and no safetensors; a pickle can run code when it is read, so octavo never "
            "does: if you trust it, write it again with save_pretrained of transformers"
        )
    return [weights]


def _has_header(path: Path) -> bool:
    """Whether a file of another name begins as one of safetensors does: the header's length, then JSON."""
    try:
        require_regular(path)
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except (OSError, ValueError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _meta(path: Path, name: str, stored: Any) -> torch.Tensor:
    dtype = stored.get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {name!r} has dtype {dtype}, which octavo does not read")
    return torch.empty(stored.get_shape(), dtype=DTYPES[dtype], device="meta")


def _checksums(file: Any, path: Path) -> dict[str, str]:
    """By name; {} if the file has none, which is not an error."""
    text = (file.metadata() or {}).get("crc32")
    if text is None:
        return {}
    checksums = parse_json(text, f"{path}: the list of checksums")
    if checksums.keys() != set(file.keys()):
        raise ValueError(f"{path}: the checksums do not match its tensors; damaged file")
    return checksums


def _checked(file: Any, name: str, checksums: dict[str, str], path: Path) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if checksums and checksums[name] != f"{checksum(tensor):08x}":
        raise ValueError(f"{path}: {name!r} is damaged: its checksum is not the one it was written with")
    return tensor


def _header_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


# Writing


def _entries(layout: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """The header's entries. Wide dtypes first: readers map the file, so every tensor must be aligned."""
    entries, end = {}, 0
    for name in sorted(layout, key=lambda name: (-layout[name].element_size(), name)):
        tensor = layout[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return entries


def _header(entries: dict[str, dict[str, Any]], checksums: dict[str, int]) -> bytes:
    digits = {name: f"{value:08x}" for name, value in checksums.items()}
    text = json.dumps({"__metadata__": {"format": "pt", "crc32": json.dumps(digits)}, **entries})
    data = text.encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()  # of one element the stride may be any
