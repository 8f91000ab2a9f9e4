# SPDX-License-Identifier: Apache-2.0
"""Values of a GGUF file's metadata: numbers, texts, and arrays of either, each with the type that the file gives it.

A value stays the bytes of its file until somebody asks for it. So what is not understood is written back as it came,
and a vocabulary of a hundred thousand tokens costs nothing until a tokenizer is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STRING, ARRAY, UINT32 = 8, 9, 4
# Types of numbers: what struct calls them. The two others are STRING, a length and UTF-8, and ARRAY.
NUMBER_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NAMES = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "string": 8,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


@dataclass(frozen=True)
class MetadataValue:
    """One value: the number of its type, and its bytes in the file."""

    kind: int
    raw: bytes

    def decode(self) -> Any:
        """The value as Python has it: int, float, bool, str, or a list. Raises: ValueError if a text is no UTF-8."""
        if self.kind in NUMBER_FORMS:
            return struct.unpack(f"<{NUMBER_FORMS[self.kind]}", self.raw)[0]
        if self.kind == STRING:
            return str(self.raw[8:], "utf-8")
        item, count = struct.unpack_from("<IQ", self.raw)
        if item in NUMBER_FORMS:
            return list(struct.unpack_from(f"<{count}{NUMBER_FORMS[item]}", self.raw, 12))
        texts, at = [], 12
        for _ in range(count):
            end = at + 8 + int.from_bytes(self.raw[at : at + 8], "little")
            texts.append(str(self.raw[at + 8 : end], "utf-8"))
            at = end
        return texts

    @property
    def length(self) -> int | None:
        """How many items an array has; None for anything else."""
        return struct.unpack_from("<IQ", self.raw)[1] if self.kind == ARRAY else None


def number(value: float, type: str = "uint32") -> MetadataValue:
    """A number or a truth value of one of GGUF's types."""
    kind = _NAMES[type]
    return MetadataValue(kind, struct.pack(f"<{NUMBER_FORMS[kind]}", value))


def text(value: str) -> MetadataValue:
    """A text, which may be empty."""
    return MetadataValue(STRING, text_bytes(value))


def array(items: Sequence[Any], type: str) -> MetadataValue:
    """Numbers or texts of one type, perhaps none."""
    kind = _NAMES[type]
    head = struct.pack("<IQ", kind, len(items))
    if kind == STRING:
        return MetadataValue(ARRAY, head + b"".join(map(text_bytes, items)))
    return MetadataValue(ARRAY, head + struct.pack(f"<{len(items)}{NUMBER_FORMS[kind]}", *items))


def text_bytes(value: str) -> bytes:
    """A text as GGUF has it: the length as a uint64, and UTF-8."""
    content = value.encode("utf-8")
    return struct.pack("<Q", len(content)) + content
