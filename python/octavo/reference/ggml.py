# SPDX-License-Identifier: Apache-2.0
"""Matrices whose rows are blocks of GGML, bit for bit: from floats, to floats, packed and unpacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .codes import pack_weight, unpack_weight
from .ggml_blocks import BLOCK_TYPES, BlockParts, BlockType, assembled, decoded, disassembled
from .ggml_encoders import BlockInput, encoded
from .ggml_searches import in_order
from .groups import pack_planes, unpack_planes


def ggml_quantize(x: torch.Tensor, type: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """As octavo.ops.ggml_quantize, for finite x and scales that float16 has."""
    kind = BLOCK_TYPES[type]
    n, k = x.shape
    rows = x.float()
    mean_square = (in_order(rows * rows) / k).repeat_interleave(k // kind.elements)[:, None]
    weights = None
    if importance is not None:
        weights = importance.float().expand(n, k).reshape(-1, kind.elements)
    given = BlockInput(rows.reshape(-1, kind.elements), weights, mean_square)
    return assembled(kind, encoded(kind, given)).reshape(n, -1)


def ggml_dequantize(
    blocks: torch.Tensor, type: str, k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight [n, k]."""
    kind = BLOCK_TYPES[type]
    return decoded(kind, disassembled(kind, blocks.reshape(-1, kind.size))).reshape(len(blocks), k).to(dtype)


def ggml_pack(
    blocks: torch.Tensor, type: str, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As octavo.ops.ggml_pack: codes, scale, super_scale and minimum, all of them bytes."""
    kind, n = BLOCK_TYPES[type], len(blocks)
    parts = disassembled(kind, blocks.reshape(-1, kind.size))
    codes = parts.codes.reshape(n, k)
    packed = (
        pack_weight((codes ^ 128).view(torch.int8))[0] if kind.bits == 8 else pack_planes(codes, kind.bits)
    )
    nothing = torch.zeros(0, dtype=torch.uint8)
    halves = [_in_strips(half.reshape(n, -1)) for half in parts.halves.view(torch.int16).unbind(1)]
    scale, super_scale, minimum = nothing, nothing, nothing
    if kind.scales == "half":
        scale, minimum = halves[0], halves[1] if kind.has_minimum else nothing
    else:
        scale = _in_strips(parts.scale.reshape(n, -1))
        if kind.two_levels:
            super_scale = torch.stack(halves, 2)
        if parts.minimum.shape[1]:
            minimum = _in_strips(parts.minimum.reshape(n, -1))
    codes, scale, super_scale, minimum = (
        each.view(torch.uint8) for each in (packed, scale, super_scale, minimum)
    )
    return codes, scale, super_scale, minimum


def ggml_unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    super_scale: torch.Tensor,
    minimum: torch.Tensor,
    type: str,
    n: int,
    k: int,
) -> torch.Tensor:
    """The blocks that ggml_pack has packed."""
    kind = BLOCK_TYPES[type]
    unpacked = unpack_weight(codes.view(torch.int8), n, k).view(torch.uint8) ^ 128 if kind.bits == 8 else None
    if unpacked is None:
        unpacked = unpack_planes(codes, n, k)
    count = n * k // kind.elements
    numbers = torch.zeros(count, 0, dtype=torch.uint8)
    if kind.scales == "half":
        halves = [scale, minimum] if kind.has_minimum else [scale]
        own = [numbers, numbers]
    else:
        halves = list(super_scale.unbind(2)) if kind.two_levels else []
        own = [
            _from_strips(each, n).reshape(count, -1) if each.numel() else numbers for each in (scale, minimum)
        ]
    columns = [_from_strips(half.view(torch.int16), n).reshape(count, 1) for half in halves]
    joined = torch.cat(columns, 1) if columns else numbers.to(torch.int16)
    parts = BlockParts(unpacked.reshape(count, -1), joined.view(torch.float16), *own)
    return assembled(kind, parts).reshape(n, -1)


def _in_strips(rows: torch.Tensor) -> torch.Tensor:
    """[n, groups] as [ceil(n / 16), groups, 16], with zeros after the last row."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % 16))
    return padded.reshape(-1, 16, rows.shape[1]).transpose(1, 2).contiguous()


def _from_strips(strips: torch.Tensor, n: int) -> torch.Tensor:
    return strips.transpose(1, 2).reshape(-1, strips.shape[1])[:n].contiguous()


__all__ = ["BLOCK_TYPES", "BlockType", "ggml_dequantize", "ggml_pack", "ggml_quantize", "ggml_unpack"]
