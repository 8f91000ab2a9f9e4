# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: metadata, and where each tensor lies. Nothing in it is believed.

Readers of others trust counts, lengths and offsets, so a damaged file makes them crash, hang, or read one tensor for
another. This one walks the mapped bytes once and checks every rule that ggml's own reader checks before anything else
looks at the file; what the types of blocks are is asked of the package gguf.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..disk import require_regular
from .values import ARRAY, NUMBER_FORMS, STRING, UINT32, MetadataValue, text_bytes

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
ALIGNMENT_KEY, ARCHITECTURE_KEY = "general.alignment", "general.architecture"
MOST_AXES, LONGEST_NAME, LONGEST_KEY = 4, 63, 65535
# The formats that came before GGUF, by their first four bytes.
_OLDER = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}


class TensorInfo(NamedTuple):
    """What the header says of a tensor.

    type     of its blocks, as ggml calls it: "F32", "Q4_K"
    shape    as torch has it, the fastest axis last
    offset   in bytes, from the beginning of the file
    """

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> tuple[int, ...]:
        """All axes but the last: a row is a whole number of blocks."""
        return self.shape[:-1]


@dataclass(frozen=True)
class GGUFHeader:
    """A file, or one of several that belong together.

    metadata    {key: value}, in the file's order
    tensors     {name: where it lies}, in the file's order
    end         how many bytes the file has behind the last tensor
    """

    path: Path
    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]
    end: int = 0

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata. Raises: ValueError with the file's name if it is a text that is no UTF-8."""
        found = self.metadata.get(key)
        try:
            return default if found is None else found.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {key} is not UTF-8; the file is damaged") from error

    @property
    def alignment(self) -> int:
        return self.get(ALIGNMENT_KEY, ALIGNMENT)

    @property
    def architecture(self) -> str:
        """Raises: ValueError if the file does not tell."""
        name = self.get(ARCHITECTURE_KEY)
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{self.path} has no {ARCHITECTURE_KEY}, so it holds no model: is it an adapter?"
            )
        return name


def block_sizes() -> dict[int, tuple[str, int, int]]:
    """{the number of a type: its name, how many weights a block has, how many bytes}.

    Raises: ImportError if gguf is missing.
    """
    gguf = package()
    sizes = {int(type): (type.name, weights, size) for type, (weights, size) in gguf.GGML_QUANT_SIZES.items()}
    sizes.setdefault(42, ("Q2_0", 64, 18))  # llama.cpp has it, the package not yet
    return sizes


def package() -> Any:
    """The package gguf. Raises: ImportError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def mapped_tensors(header: GGUFHeader) -> dict[str, torch.Tensor]:
    """The bytes of each tensor of one file, uint8 [rows, bytes of a row], mapped from it: nothing is read yet."""
    if not header.tensors:
        return {}
    size = max(info.offset + info.bytes for info in header.tensors.values())
    content = torch.from_file(str(header.path), shared=False, size=size, dtype=torch.uint8)
    return {
        name: content[info.offset : info.offset + info.bytes].view(*info.rows, -1)
        for name, info in header.tensors.items()
    }


def is_gguf(path: Path) -> bool:
    """Whether `path` begins as a GGUF file, or one of the formats before it. Raises nothing."""
    try:
        with open(path, "rb") as file:
            return path.is_file() and file.read(4) in (MAGIC, *_OLDER)
    except OSError:
        return False


def read_header(path: Path) -> GGUFHeader:
    """Reads and checks the header of one file; the tensors' bytes are not looked at.

    Raises: FileNotFoundError, PermissionError; ValueError, which says what is wrong and what to do, for a file that is
    truncated, damaged, big-endian, of version 1 or of a format before GGUF; ImportError if gguf is missing.
    """
    require_regular(path)
    sizes = block_sizes()
    with open(path, "rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, a GGUF file has at least 24")
        # Never closed by hand: an error's traceback may still look at pieces of it.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Reader(path, content).header(sizes)


class _Reader:
    """Walks through the bytes of a file; `at` is where it is."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, memoryview(content), 0

    def header(self, sizes: Mapping[int, tuple[str, int, int]]) -> GGUFHeader:
        version = self._version()
        tensors, keys = self._unpack("<QQ")
        metadata: dict[str, MetadataValue] = {}
        for _ in range(keys):
            key = self._name("a key", LONGEST_KEY)
            if key in metadata:
                raise self._damage(f"the key {key!r} comes twice")
            metadata[key] = self._value(key)
        alignment = self._alignment(metadata)
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._name("a tensor's name", LONGEST_NAME)
            if name in entries:
                raise self._damage(f"the tensor {name!r} comes twice")
            entries[name] = self._entry(name, sizes)
        return self._placed(version, metadata, entries, alignment)

    def _version(self) -> int:
        magic = bytes(self._take(4))
        if magic in _OLDER:
            raise ValueError(
                f"{self.path} is a {_OLDER[magic]} file, the format before GGUF: get the model as GGUF, or convert it "
                "with convert_llama_ggml_to_gguf.py of llama.cpp"
            )
        if magic != MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        (version,) = self._unpack("<I")
        if version & 0xFFFF == 0 and version:
            raise ValueError(
                f"{self.path} is a big-endian GGUF file: `gguf-convert-endian {self.path.name} little`, of the package "
                "gguf, makes a little-endian one"
            )
        if version not in VERSIONS:
            remedy = "get or convert it anew" if version < 2 else "a newer octavo may read it"
            raise ValueError(f"{self.path} is of GGUF version {version}, versions 2 and 3 are read; {remedy}")
        return version

    def _value(self, key: str) -> MetadataValue:
        (kind,) = self._unpack("<I")
        start = self.at
        if kind in NUMBER_FORMS:
            self._take(struct.calcsize(NUMBER_FORMS[kind]))
        elif kind == STRING:
            self._text()
        elif kind == ARRAY:
            self._array(key)
        else:
            raise self._damage(f"{key!r} has a value of type {kind}, which GGUF does not have")
        return MetadataValue(kind, bytes(self.content[start : self.at]))

    def _array(self, key: str) -> None:
        item, count = self._unpack("<IQ")
        if item in NUMBER_FORMS:
            self._take(struct.calcsize(NUMBER_FORMS[item]) * count)
        elif item == STRING:
            self._skip_texts(count)
        else:
            raise self._damage(f"{key!r} is an array of items of type {item}, which GGUF does not have")

    def _skip_texts(self, count: int) -> None:
        """Each takes 8 bytes at least, so a count that lies ends with the file. A vocabulary is long: no calls."""
        length_at, content, at = struct.Struct("<Q").unpack_from, self.content, self.at
        last = len(content) - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + length_at(content, at)[0]
        else:
            self._take(at - self.at)
            return
        raise self._damage(f"an array of {count:,} texts goes beyond the file's {len(content):,} bytes")

    def _alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        found = metadata.get(ALIGNMENT_KEY)
        if found is None:
            return ALIGNMENT
        value = found.decode() if found.kind == UINT32 else 0
        if value == 0 or value & (value - 1):
            raise self._damage(f"{ALIGNMENT_KEY} is no power of two of type uint32")
        return value

    def _entry(
        self, name: str, sizes: Mapping[int, tuple[str, int, int]]
    ) -> tuple[str, tuple[int, ...], int, int]:
        """Type, shape, offset in the data and bytes of a tensor."""
        (axes,) = self._unpack("<I")
        if not 1 <= axes <= MOST_AXES:
            raise self._damage(f"the tensor {name!r} has {axes} axes, 1 to {MOST_AXES} are allowed")
        extents = self._unpack(f"<{axes}Q")
        number, offset = self._unpack("<IQ")
        if number not in sizes:
            raise ValueError(
                f"{self.path}: the tensor {name!r} is of type {number}, which the package gguf does not know; a newer "
                "one may: pip install --upgrade gguf"
            )
        type, weights, size = sizes[number]
        total = math.prod(extents)
        if total == 0 or total >= 1 << 63:
            raise self._damage(f"the tensor {name!r} has the shape {extents[::-1]}")
        if extents[0] % weights:
            raise self._damage(
                f"the tensor {name!r} has rows of {extents[0]}, {type} needs a multiple of {weights}"
            )
        return type, extents[::-1], offset, total // weights * size

    def _placed(
        self,
        version: int,
        metadata: dict[str, MetadataValue],
        entries: Mapping[str, tuple[str, tuple[int, ...], int, int]],
        alignment: int,
    ) -> GGUFHeader:
        """The header, once each tensor is found to lie right behind the one before it, within the file."""
        tensors: dict[str, TensorInfo] = {}
        start = end = padded(self.at, alignment)
        for name, (type, shape, offset, size) in entries.items():
            expected = padded(end, alignment)
            if start + offset != expected:
                raise self._damage(
                    f"the tensor {name!r} lies at {offset} of the data, {expected - start} is where the one before ends"
                )
            end = expected + size
            if end > len(self.content):
                raise ValueError(
                    f"{self.path} is truncated: {name!r} ends at byte {end:,} of {len(self.content):,}; get the file "
                    "again"
                )
            tensors[name] = TensorInfo(self.path, name, type, shape, expected, size)
        return GGUFHeader(self.path, version, metadata, tensors, max(0, len(self.content) - end))

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self.content):
            raise self._damage(f"{count:,} bytes at {self.at:,} go beyond the file's {len(self.content):,}")
        taken, self.at = self.content[self.at : end], end
        return taken

    def _unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _text(self) -> memoryview:
        return self._take(int.from_bytes(self._take(8), "little"))

    def _name(self, what: str, longest: int) -> str:
        raw = self._text()
        try:
            if 0 < len(raw) <= longest:
                return str(raw, "utf-8")
        except UnicodeDecodeError:
            pass
        raise self._damage(f"{what} of {len(raw):,} bytes is no UTF-8 of 1 to {longest:,} bytes")

    def _damage(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {reason}")


def header_bytes(
    version: int,
    metadata: Mapping[str, MetadataValue],
    tensors: Iterable[tuple[str, int, tuple[int, ...], int]],
    alignment: int,
) -> bytes:
    """A header up to where the data begins.

    tensors   (name, number of the type, shape as torch has it, bytes) of each, in the order of the data
    """
    tensors = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [text_bytes(key), struct.pack("<I", value.kind), value.raw]
    offset = 0
    for name, number, shape, size in tensors:
        form = f"<I{len(shape)}QIQ"
        parts += [text_bytes(name), struct.pack(form, len(shape), *shape[::-1], number, offset)]
        offset += padded(size, alignment)
    head = b"".join(parts)
    return head + bytes(padded(len(head), alignment) - len(head))


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment
