# SPDX-License-Identifier: Apache-2.0
"""The blocks of GGML: what the bytes of each type are, taken apart into codes and numbers and put together again.

    value = scale * (code - offset) + minimum        or scale * values[code]

Blocks are uint8 [blocks, bytes]. docs/numerics.md has the formulas; the layouts are those of ggml 0.25, ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FLOAT4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled

Scales = Literal["half", "integers", "halves_of_bytes", "e8m0", "e4m3"]


class BlockParts(NamedTuple):
    """Blocks, taken apart.

    codes    uint8 [blocks, elements]
    halves   float16 [blocks, 0, 1 or 2]: the scale, or what scales are multiples of; the same for minima
    scale, minimum   uint8 [blocks, groups] or [blocks, 0]; signed integers modulo 256
    """

    codes: torch.Tensor
    halves: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    name, number   as ggml and files have them
    elements, size   of a block, in weights and in bytes
    group     weights that share a scale
    bits      of a packed code
    offset    what is subtracted from codes, or makes `values` unsigned
    scales    how a group has its scale: the float16 of the block; an integer times that; half of a byte times that, the
              other half being the minimum; a float of 8 bits
    signed    whether these integers are
    has_minimum   whether groups have a minimum
    values    of 16 codes; () if they are integers
    """

    name: str
    number: int
    elements: int
    size: int
    group: int
    bits: int
    offset: int
    scales: Scales = "half"
    signed: bool = False
    has_minimum: bool = False
    values: tuple[int, ...] = field(default=(), repr=False)

    @property
    def groups(self) -> int:
        """Of a block."""
        return self.elements // self.group

    @property
    def halves(self) -> int:
        """How many float16 numbers a block has."""
        return 0 if self.scales in ("e8m0", "e4m3") else 2 if self.has_minimum else 1

    @property
    def two_levels(self) -> bool:
        return self.scales in ("integers", "halves_of_bytes")

    @property
    def bits_per_weight(self) -> float:
        """In files."""
        return 8 * self.size / self.elements

    def row_bytes(self, k: int) -> int:
        return k // self.elements * self.size


_TYPES = (
    BlockType("Q4_0", 2, 32, 18, 32, 4, 8),
    BlockType("Q4_1", 3, 32, 20, 32, 4, 0, has_minimum=True),
    BlockType("Q5_0", 6, 32, 22, 32, 5, 16),
    BlockType("Q5_1", 7, 32, 24, 32, 5, 0, has_minimum=True),
    BlockType("Q8_0", 8, 32, 34, 32, 8, 128),
    BlockType("Q2_K", 10, 256, 84, 16, 2, 0, "halves_of_bytes", has_minimum=True),
    BlockType("Q3_K", 11, 256, 110, 16, 3, 4, "integers", signed=True),
    BlockType("Q4_K", 12, 256, 144, 32, 4, 0, "integers", has_minimum=True),
    BlockType("Q5_K", 13, 256, 176, 32, 5, 0, "integers", has_minimum=True),
    BlockType("Q6_K", 14, 256, 210, 16, 6, 32, "integers", signed=True),
    BlockType("IQ4_NL", 20, 32, 18, 32, 4, 127, values=IQ4_VALUES),
    BlockType("IQ4_XS", 23, 256, 136, 32, 4, 127, "integers", signed=True, values=IQ4_VALUES),
    BlockType("TQ1_0", 34, 256, 54, 256, 2, 1),
    BlockType("TQ2_0", 35, 256, 66, 256, 2, 1),
    BlockType("MXFP4", 39, 32, 17, 32, 4, 12, "e8m0", values=FLOAT4_VALUES),
    BlockType("NVFP4", 40, 64, 36, 16, 4, 12, "e4m3", values=FLOAT4_VALUES),
    BlockType("Q1_0", 41, 128, 18, 128, 2, 1),
    BlockType("Q2_0", 42, 64, 18, 64, 2, 1),
)
BLOCK_TYPES = {kind.name: kind for kind in _TYPES}


def disassembled(kind: BlockType, blocks: torch.Tensor) -> BlockParts:
    """`blocks` uint8 [blocks, kind.size]."""
    at = _places(kind)
    pieces = {name: blocks[:, begin:end] for name, (begin, end) in at.items()}
    nothing = blocks[:, :0]
    halves = torch.cat([pieces.get("d", nothing), pieces.get("m", nothing)], 1).contiguous()
    halves = halves.view(torch.float16) if halves.shape[1] else halves.half()
    scale, minimum = _numbers(kind, pieces.get("scales", nothing))
    return BlockParts(_codes(kind, pieces), halves, scale, minimum)


def assembled(kind: BlockType, parts: BlockParts) -> torch.Tensor:
    """The inverse of `disassembled`."""
    blocks = torch.zeros(len(parts.codes), kind.size, dtype=torch.uint8)
    pieces = {"scales": _number_bytes(kind, parts), **_code_bytes(kind, parts.codes)}
    if kind.halves:
        halves = parts.halves.contiguous().view(torch.uint8)
        pieces |= {"d": halves[:, :2], "m": halves[:, 2:4]}
    for name, (begin, end) in _places(kind).items():
        blocks[:, begin:end] = pieces[name]
    return blocks


def _places(kind: BlockType) -> dict[str, tuple[int, int]]:
    """Where the pieces of a block lie: d, m, scales, and the codes, of which some types have the high bits apart."""
    orders = {
        "Q4_1": "d m codes:16",
        "Q5_0": "d high:4 codes:16",
        "Q5_1": "d m high:4 codes:16",
        "Q8_0": "d codes:32",
        "Q2_K": "scales:16 codes:64 d m",
        "Q3_K": "high:32 codes:64 scales:12 d",
        "Q4_K": "d m scales:12 codes:128",
        "Q5_K": "d m scales:12 high:32 codes:128",
        "Q6_K": "codes:128 high:64 scales:16 d",
        "IQ4_XS": "d scales:6 codes:128",
        "TQ1_0": "codes:52 d",
        "TQ2_0": "codes:64 d",
        "MXFP4": "scales:1 codes:16",
        "NVFP4": "scales:4 codes:32",
    }
    places, begin = {}, 0
    for piece in orders.get(kind.name, "d codes:16").split():
        name, _, size = piece.partition(":")
        places[name] = begin, begin + int(size or 2)
        begin = places[name][1]
    return places


# --- bits -----------------------------------------------------------------------------------------------------------


def _spread(data: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Codes of `bits` bits. In each run of bytes, the lowest bits of all of them come first."""
    runs = data.reshape(len(data), -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (runs >> shifts & (1 << bits) - 1).reshape(len(data), -1)


def _gather(codes: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `_spread`."""
    runs = codes.reshape(len(codes), -1, 8 // bits, run) & (1 << bits) - 1
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (runs << shifts).sum(2, dtype=torch.uint8).reshape(len(codes), -1)


# (bits, bytes in a run) of the codes of each type, and of their high bits.
_CODES = {"Q2_K": (2, 32), "Q3_K": (2, 32), "Q4_K": (4, 32), "Q5_K": (4, 32), "Q6_K": (4, 64)}
_CODES |= {"TQ2_0": (2, 32), "NVFP4": (4, 8), "Q1_0": (1, 1), "Q2_0": (2, 1)}
_HIGH = {"Q5_0": (1, 1), "Q5_1": (1, 1), "Q3_K": (1, 32), "Q5_K": (1, 32), "Q6_K": (2, 32)}


def _codes(kind: BlockType, pieces: dict[str, torch.Tensor]) -> torch.Tensor:
    if kind.name == "Q8_0":
        return pieces["codes"] ^ 128
    if kind.name == "TQ1_0":
        return torch.cat([_digits(part, count) for part, count in _runs_of_digits(pieces["codes"])], 1)
    bits, run = _CODES.get(kind.name, (4, 16))
    codes = _spread(pieces["codes"], bits, run)
    if kind.name == "Q1_0":
        return 2 * codes
    return codes | _spread(pieces["high"], *_HIGH[kind.name]) << bits if "high" in pieces else codes


def _code_bytes(kind: BlockType, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    if kind.name == "Q8_0":
        return {"codes": codes ^ 128}
    if kind.name == "TQ1_0":
        runs = codes[:, :160].unflatten(1, (5, 32)), codes[:, 160:240].unflatten(1, (5, 16))
        last = F.pad(codes[:, 240:].unflatten(1, (4, 4)), (0, 0, 0, 1))
        return {"codes": torch.cat([_fraction(each) for each in (*runs, last)], 1)}
    if kind.name == "Q1_0":
        codes = codes >> 1
    bits, run = _CODES.get(kind.name, (4, 16))
    pieces = {"codes": _gather(codes, bits, run)}
    if kind.name in _HIGH:
        pieces["high"] = _gather(codes >> bits, *_HIGH[kind.name])
    return pieces


def _runs_of_digits(data: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    return [(data[:, :32], 5), (data[:, 32:48], 5), (data[:, 48:], 4)]


def _digits(data: torch.Tensor, count: int) -> torch.Tensor:
    """Digits of base 3, of a byte that is a fraction of 256: three times it has the first one above the point."""
    powers = 3 ** torch.arange(count, dtype=torch.int32)[:, None]
    return ((data.int()[:, None] * powers & 255) * 3 >> 8).to(torch.uint8).reshape(len(data), -1)


def _fraction(digits: torch.Tensor) -> torch.Tensor:
    """The byte of five digits [blocks, 5, bytes], rounded up so that all of them come back."""
    numbers = (digits.int() * torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)[:, None]).sum(1)
    return ((numbers * 256 + 242) // 243).to(torch.uint8)


# --- scales ---------------------------------------------------------------------------------------------------------


def _numbers(kind: BlockType, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = data[:, :0]
    if kind.name in ("Q4_K", "Q5_K"):  # 6 bits each; those of the last four groups are in two pieces
        first, second, third = data.split(4, 1)
        scale = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
        return scale, torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    if kind.name == "Q3_K":  # 6 bits, plus 32
        low, high = _spread(data[:, :8], 4, 8), _spread(data[:, 8:], 2, 4)
        return (low | high << 4) - 32, nothing
    if kind.name == "IQ4_XS":
        low, high = _spread(data[:, 2:], 4, 1), _spread(data[:, :2], 2, 1)
        return (low | high << 4) - 32, nothing
    return data, nothing


def _number_bytes(kind: BlockType, parts: BlockParts) -> torch.Tensor:
    scale, minimum = parts.scale, parts.minimum
    if kind.name in ("Q4_K", "Q5_K"):
        high = scale[:, 4:] >> 4, minimum[:, 4:] >> 4
        third = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
        return torch.cat([scale[:, :4] | high[0] << 6, minimum[:, :4] | high[1] << 6, third], 1)
    shifted = scale + 32 & 63
    if kind.name == "Q3_K":
        return torch.cat([_gather(shifted & 15, 4, 8), _gather(shifted >> 4, 2, 4)], 1)
    if kind.name == "IQ4_XS":
        return torch.cat([_gather(shifted >> 4, 2, 1), _gather(shifted & 15, 4, 1)], 1)
    return scale


# --- what they are worth ----------------------------------------------------------------------------------------------


def group_numbers(kind: BlockType, parts: BlockParts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and minimum of each group, float32 [blocks, groups]; None: there are no minima."""
    halves = parts.halves.float()
    if kind.scales == "half":
        return halves[:, :1], halves[:, 1:] if kind.has_minimum else None
    if kind.scales == "e8m0":
        return float_of_e8m0(parts.scale) / 2, None
    if kind.scales == "e4m3":
        return float_of_e4m3(parts.scale) / 2, None
    scale, minimum = parts.scale, parts.minimum
    if kind.scales == "halves_of_bytes":
        scale, minimum = scale & 15, scale >> 4
    numbers = (scale.view(torch.int8) if kind.signed else scale).float()
    return halves[:, :1] * numbers, -(halves[:, 1:] * minimum.float()) if kind.has_minimum else None


def float_of_e8m0(data: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127)."""
    return torch.where(data == 0, 1 << 22, data.int() << 23).to(torch.int32).view(torch.float32)


def float_of_e4m3(data: torch.Tensor) -> torch.Tensor:
    """4 bits of exponent, 3 of fraction; the highest bit is not read, and 0x7f is 0."""
    value = ((data & 127).to(torch.int16) << 7).view(torch.float16).float() * 256
    return torch.where(data == 0x7F, 0.0, value)


def decoded(kind: BlockType, parts: BlockParts) -> torch.Tensor:
    """What blocks are worth, float32 [blocks, elements]."""
    steps = parts.codes.float() - kind.offset
    if kind.values:
        steps = torch.tensor(kind.values, dtype=torch.float32)[parts.codes.int()]
    scale, minimum = group_numbers(kind, parts)
    value = scale[:, :, None] * steps.unflatten(1, (kind.groups, kind.group))
    if minimum is not None:
        value = value + minimum[:, :, None]
    return value.flatten(1)
