# SPDX-License-Identifier: Apache-2.0
"""Matrices whose rows are blocks of GGML: from floats, to floats, packed for `linear_groups` and back.

A type goes by the name that ggml has for it: "Q4_0", "Q4_K", "IQ4_NL", ... The layouts of the blocks are in
octavo.reference, the packed form is in docs/packed_format.md.
"""

from __future__ import annotations

import torch

from ..base.float_types import FLOAT_DTYPES
from ..reference.ggml_blocks import BLOCK_TYPES, BlockType
from .checks import check, check_dtype
from .group_shapes import planes_shape
from .registration import register_fake
from .shapes import float_type, float_vector, require

_BY_NUMBER = {kind.number: kind for kind in BLOCK_TYPES.values()}


def block_type(who: str, type: str) -> BlockType:
    """The type of blocks that goes by the name `type`. Raises ValueError, in the name of `who`, if there is none."""
    kind = BLOCK_TYPES.get(type)
    if kind is None:
        raise ValueError(f"{who}: type is {type!r}, accepted are {', '.join(BLOCK_TYPES)}")
    return kind


def ggml_quantize(x: torch.Tensor, type: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The rows of `x` as blocks: the bytes that ggml's `ggml_quantize_chunk` writes.

    x        [n, k] float32, bfloat16 or float16, finite; k is a whole number of blocks
    importance   [k] floats, not negative: how much an error of each column counts, as an imatrix of llama.cpp says it.
             Q8_0 and types of fewer than two bits, or of 4-bit floats, take no notice of it
    returns  uint8 [n, bytes of a row]
    raises   ValueError for NaN, Inf, a k that does not fit, and values that need scales which float16 does not have.
             Scales too small for float16 become 0, and so do all values of their block
    source   ggml 0.25, compiled without fma; docs/numerics.md
    """
    check("ggml_quantize", "x", x, FLOAT_DTYPES)
    return torch.ops.octavo.ggml_quantize(x, block_type("ggml_quantize", type).number, importance)


def ggml_dequantize(
    blocks: torch.Tensor, type: str, k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What blocks are worth.

    blocks   uint8 [n, bytes of a row]
    returns  [n, k] of `dtype` (float32, bfloat16, float16): the values of gguf-py in float32, bit for bit, then rounded
    """
    check_dtype("ggml_dequantize", dtype, FLOAT_DTYPES)
    return torch.ops.octavo.ggml_dequantize(blocks, block_type("ggml_dequantize", type).number, k, dtype)


def ggml_pack(
    blocks: torch.Tensor, type: str, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks as `linear_groups` reads them; nothing is lost.

    blocks   uint8 [n, bytes of a row]
    returns  codes, scale, super_scale and minimum, each uint8: the bytes of what a GroupWeight has, with a last axis of
             16 numbers; an empty tensor for what the type does not have
    """
    return torch.ops.octavo.ggml_pack(blocks, block_type("ggml_pack", type).number, k)


def ggml_unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    super_scale: torch.Tensor,
    minimum: torch.Tensor,
    type: str,
    n: int,
    k: int,
) -> torch.Tensor:
    """The blocks uint8 [n, bytes of a row] that `ggml_pack` has packed, byte for byte."""
    number = block_type("ggml_unpack", type).number
    return torch.ops.octavo.ggml_unpack(codes, scale, super_scale, minimum, number, n, k)


# --- fakes ----------------------------------------------------------------------------------------------------------


def _kind(op: str, number: int, k: int) -> BlockType:
    require(number in _BY_NUMBER, f"{op}: type {number} is none that octavo has blocks for")
    kind = _BY_NUMBER[number]
    text = f"{op}: k must be a whole number of blocks, which for {kind.name} have {kind.elements} elements; it is {k}"
    require(k >= 0 and k % kind.elements == 0, text)
    return kind


def _blocks(op: str, blocks: torch.Tensor, kind: BlockType, k: int) -> None:
    size = kind.row_bytes(k)
    text = f"{op}: blocks must be uint8 [n, {size}] for {kind.name} and k = {k}"
    require(blocks.dim() == 2 and blocks.dtype == torch.uint8, text)
    require(blocks.shape[1] == size, text)


def _packed_shapes(kind: BlockType, n: int, k: int) -> dict[str, tuple[int, ...]]:
    strips, blocks, groups = (n + 15) // 16, k // kind.elements, k // kind.group
    codes = (strips, (k + 63) // 64, 16, 64) if kind.bits == 8 else planes_shape(n, k, kind.bits)
    scale = strips, groups, 32 if kind.scales == "half" else 16
    rows = 2 if kind.has_minimum else 1
    return {
        "codes": codes,
        "scale": scale,
        "super_scale": (strips, blocks, rows, 32) if kind.two_levels else (0,),
        "minimum": scale if kind.has_minimum and kind.scales != "halves_of_bytes" else (0,),
    }


@register_fake("octavo::ggml_quantize")
def _(x, type, importance=None):
    op = "ggml_quantize"
    require(type in _BY_NUMBER, f"{op}: type {type} is none that octavo has blocks for")
    float_type(op, "x", x)
    require(x.dim() == 2, f"{op}: x must have 2 dimensions [n, k], has {x.dim()}")
    n, k = x.shape
    kind = _kind(op, type, k)
    float_vector(op, "importance", importance, k)
    return x.new_empty((n, kind.row_bytes(k)), dtype=torch.uint8)


@register_fake("octavo::ggml_dequantize")
def _(blocks, type, k, dtype):
    op = "ggml_dequantize"
    require(type in _BY_NUMBER, f"{op}: type {type} is none that octavo has blocks for")
    require(dtype in FLOAT_DTYPES, f"{op}: dtype must be float32, bfloat16 or float16")
    _blocks(op, blocks, _kind(op, type, k), k)
    return blocks.new_empty((blocks.shape[0], k), dtype=dtype)


@register_fake("octavo::ggml_pack")
def _(blocks, type, k):
    kind = _kind("ggml_pack", type, k)
    _blocks("ggml_pack", blocks, kind, k)
    shapes = _packed_shapes(kind, blocks.shape[0], k)
    return tuple(blocks.new_empty(shape) for shape in shapes.values())


@register_fake("octavo::ggml_unpack")
def _(codes, scale, super_scale, minimum, type, n, k):
    op = "ggml_unpack"
    require(type in _BY_NUMBER, f"{op}: type {type} is none that octavo has blocks for")
    require(n >= 0, f"{op}: n must not be negative, is {n}")
    kind = _kind(op, type, k)
    given = {"codes": codes, "scale": scale, "super_scale": super_scale, "minimum": minimum}
    for name, shape in _packed_shapes(kind, n, k).items():
        tensor, sizes = given[name], ", ".join(map(str, shape))
        text = f"{op}: {name} must be uint8 [{sizes}] as ggml_pack makes it"
        require(tensor.dtype == torch.uint8 and tensor.dim() == len(shape), text)
        for size, expected in zip(tensor.shape, shape, strict=True):
            require(size == expected, text)
    return codes.new_empty((n, kind.row_bytes(k)))
