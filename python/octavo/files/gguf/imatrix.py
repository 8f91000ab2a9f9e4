# SPDX-License-Identifier: Apache-2.0
"""Files that say how much the errors of each column of a weight count: llama.cpp's imatrix, old and new.

The numbers are mean squares of what the layer reads. The old format is a list of names and numbers, the new one is a
GGUF file with a sum and a count for each tensor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..disk import folder_argument, require_regular
from ..format import errors_naming
from . import values
from .header import ALIGNMENT, header_bytes, is_gguf, mapped_tensors, padded, read_header

SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST = 1 << 20  # of a name, and of the name of the data


def load_imatrix(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """{name of a tensor in GGUF files: mean squares of its inputs, float32 [k], or [experts, k]}, of both formats.

    Raises: FileNotFoundError, PermissionError; ValueError for a damaged file, and one of another kind.
    """
    path = folder_argument("load_imatrix", path)
    with errors_naming("load_imatrix"):
        require_regular(path)
        found = _read_new(path) if is_gguf(path) else _read_old(path)
        for name, value in found.items():
            if not torch.isfinite(value).all() or (value < 0).any():
                raise ValueError(f"{path} is damaged: {name!r} has numbers that are no mean squares")
        return found


def save_imatrix(
    importance: Mapping[str, torch.Tensor], path: str | os.PathLike[str], *, old: bool = False
) -> None:
    """Writes mean squares as `load_imatrix` returns them. old: in the format of before July 2025, ".dat"."""
    path = folder_argument("save_imatrix", path)
    path.write_bytes(_old_bytes(importance) if old else _new_bytes(importance))


def importance_argument(given: Any) -> Mapping[str, torch.Tensor]:
    """The argument `imatrix`: a mapping as it is, a path as the file's contents, nothing for None."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return given
    return load_imatrix(given)


def _read_new(path: Path) -> dict[str, torch.Tensor]:
    header = read_header(path)
    if header.get("general.type") != "imatrix":
        raise ValueError(f"{path} is a GGUF file of the type {header.get('general.type')!r} and no imatrix")
    contents = mapped_tensors(header)
    found = {}
    for name in header.tensors:
        if name.endswith(SUMS):
            stem = name.removesuffix(SUMS)
            kinds = {header.tensors[each].type for each in (name, stem + COUNTS) if each in header.tensors}
            if stem + COUNTS not in contents or kinds != {"F32"}:
                raise ValueError(f"{path} is damaged: {stem!r} must have sums and counts of float32")
            sums = contents[name].clone().view(torch.float32)
            sums = sums.reshape(-1, sums.shape[-1])
            counts = contents[stem + COUNTS].clone().view(torch.float32).reshape(-1, 1)
            if len(counts) != len(sums):
                raise ValueError(f"{path} is damaged: {stem!r} has {len(sums)} sums and {len(counts)} counts")
            mean = torch.where(counts > 0, sums / counts.clamp(min=1e-30), torch.ones(()))
            found[stem] = mean[0] if len(mean) == 1 else mean
    return found


def _new_bytes(importance: Mapping[str, torch.Tensor]) -> bytes:
    metadata = {
        "general.type": values.text("imatrix"),
        "imatrix.datasets": values.array([], "string"),
        "imatrix.chunk_count": values.number(1),
        "imatrix.chunk_size": values.number(1),
    }
    tensors, data = [], []
    for name, mean in importance.items():
        rows = mean.float().reshape(-1, mean.shape[-1])
        for suffix, value in ((COUNTS, torch.ones(len(rows), 1)), (SUMS, rows)):
            content = value.contiguous().numpy().tobytes()
            tensors.append((name + suffix, 0, tuple(value.shape), len(content)))
            data.append(content + bytes(padded(len(content), ALIGNMENT) - len(content)))
    return header_bytes(3, metadata, tensors, ALIGNMENT) + b"".join(data)


def _read_old(path: Path) -> dict[str, torch.Tensor]:
    """An int32 counts the entries: name, calls, and numbers, which are sums over the calls of mean squares."""
    content, at, found = path.read_bytes(), 0, {}

    def take(form: str) -> Any:
        nonlocal at
        size = struct.calcsize(form)
        if at + size > len(content):
            raise ValueError(
                f"{path} is no imatrix, or truncated: {size:,} bytes at {at:,} go beyond its end"
            )
        taken = struct.unpack_from(form, content, at)
        at += size
        return taken

    (count,) = take("<i")
    for _ in range(count):
        (length,) = take("<i")
        if not 0 < length <= LONGEST:
            raise ValueError(f"{path} is no imatrix: a name of {length} bytes at {at:,}")
        (raw,) = take(f"<{length}s")
        calls, numbers = take("<ii")
        if calls < 0 or numbers < 1:
            raise ValueError(f"{path} is no imatrix: {numbers} numbers of {calls} calls at {at:,}")
        value = torch.tensor(take(f"<{numbers}f"))
        found[raw.decode("utf-8", "replace")] = value / max(calls, 1)
    return found


def _old_bytes(importance: Mapping[str, torch.Tensor]) -> bytes:
    parts = [struct.pack("<i", len(importance))]
    for name, mean in importance.items():
        numbers = mean.float().flatten().tolist()
        raw = name.encode()
        parts.append(struct.pack(f"<i{len(raw)}sii{len(numbers)}f", len(raw), raw, 1, len(numbers), *numbers))
    return b"".join([*parts, struct.pack("<ii", 1, 0)])
