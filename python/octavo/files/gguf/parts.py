# SPDX-License-Identifier: Apache-2.0
"""A GGUF model in one file or in several: `model-00001-of-00003.gguf` and the others beside it.

The first part has the metadata, each part some of the tensors, and each says which one of how many it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .header import GGUFHeader, TensorInfo, mapped_tensors, read_header

PART, PARTS, PARTS_TENSORS = "split.no", "split.count", "split.tensors.count"
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GGUFFile:
    """All parts of a model, the first one first."""

    parts: tuple[GGUFHeader, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def first(self) -> GGUFHeader:
        """The part whose metadata are those of the model."""
        return self.parts[0]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for part in self.parts for name, info in part.tensors.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata. Raises: ValueError if it is a text that is no UTF-8."""
        return self.first.get(key, default)

    def mapped(self) -> dict[str, torch.Tensor]:
        """The bytes of each tensor, uint8 [rows, bytes of a row], mapped from the files."""
        return {name: content for part in self.parts for name, content in mapped_tensors(part).items()}


def read_gguf(path: Path) -> GGUFFile:
    """The model in `path`, which is its only file or its first part.

    Raises: as `read_header`; FileNotFoundError for a part that is missing; ValueError for another part than the first,
    and for parts that do not belong together.
    """
    first = read_header(path)
    count = first.get(PARTS, 1)
    if type(count) is not int or count < 1:
        raise ValueError(f"{path} is damaged: {PARTS} is {count!r}")
    if first.get(PART, 0) != 0:
        raise ValueError(
            f"{path} is part {first.get(PART)!r} of a model: give the file of its first part, 00001"
        )
    if count == 1:
        return GGUFFile((first,))
    parts = [first]
    for number, other in enumerate(_others(path, count), start=1):
        part = read_header(other)
        if (part.get(PART), part.get(PARTS)) != (number, count):
            raise ValueError(f"{other} is not part {number + 1} of the {count} that {path.name} belongs to")
        parts.append(part)
    _require_once(parts)
    expected = first.get(PARTS_TENSORS)
    total = sum(len(part.tensors) for part in parts)
    if expected is not None and expected != total:
        raise ValueError(f"{path}: the parts hold {total} tensors, {PARTS_TENSORS} is {expected!r}")
    return GGUFFile(tuple(parts))


def _others(path: Path, count: int) -> list[Path]:
    named = _NUMBERED.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise ValueError(
            f"{path} is the first of {count} parts, so its name must end on -00001-of-{count:05}.gguf, as the "
            "others' names do: rename it"
        )
    return [path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]


def _require_once(parts: list[GGUFHeader]) -> None:
    home: dict[str, Path] = {}
    for part in parts:
        for name in part.tensors:
            if name in home:
                raise ValueError(f"{part.path} is damaged: the tensor {name!r} is in {home[name].name}, too")
            home[name] = part.path
