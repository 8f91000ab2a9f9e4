# SPDX-License-Identifier: Apache-2.0
"""Weights in groups, bit for bit: their packed form, what it is worth, and the product."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .codes import MAX_16, _finish, _finite_rows, choose_qparams, fma, unpack_weight
from .ggml_blocks import float_of_e4m3, float_of_e8m0

Optional = torch.Tensor | None


def linear_groups(
    x: torch.Tensor,
    weight: tuple[Any, ...],
    bias: Optional = None,
    input_bits: int = 8,
    input_group: int = 0,
    activation: str | None = None,
) -> torch.Tensor:
    """As octavo.ops.linear_groups, of an ops.GroupWeight: segment by segment, an exact integer and then one fma."""
    _, _, _, _, _, column_scale, n, _, group_size, _ = weight
    rows, finite = _finite_rows(x)
    m, k = rows.shape
    weight_group = 0 if group_size >= k else group_size
    segment = segment_length(weight_group, input_group)
    row_scale, steps = _input_codes(rows, input_bits, input_group or max(k, 1))
    u, (scales, minima) = _unsigned_codes(weight, k), _scales(weight)
    total = torch.zeros(m, n)
    for begin in range(0, k, segment):
        part = slice(begin, begin + segment)
        t = (steps[:, part].double() @ u[:, part].double().T).float()  # exact: below 2^31
        r = steps[:, part].sum(1).float()[:, None]
        group = begin // weight_group if weight_group else 0
        s = None if scales is None else scales[:, group]
        if input_group:
            own = row_scale[:, begin // input_group, None]
            total = fma(t if s is None else t * s, own, total)
            r = own * r
        else:
            total = fma(t, torch.ones(()) if s is None else s, total)
        if minima is not None:
            total = fma(minima[:, group], r, total)
    factor = torch.ones(m, 1) if input_group else row_scale
    if column_scale is not None:
        factor = factor * column_scale
    y = fma(total, factor, torch.zeros(()) if bias is None else bias.float())
    return _finish(torch.where(finite[:, None], y, torch.nan), activation, x)


def dequantize_groups(weight: tuple[Any, ...], k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [n, k]: column_scale * (scale * (u - offset) + minimum), the bracket rounded once to float32."""
    _, _, _, _, _, column_scale, _, _, group_size, _ = weight
    value = _unsigned_codes(weight, k).double()
    scales, minima = _scales(weight)
    group = torch.arange(k) // (group_size or max(k, 1))
    if scales is not None:
        value = value * scales[:, group].double()
    if minima is not None:
        value = value + minima[:, group].double()
    dense = value.float()
    return (dense if column_scale is None else dense * column_scale[:, None]).to(dtype)


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The packed form of unsigned codes [n, k]: lines of S16, folded. docs/packed_format.md draws it."""
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % 64, 0, -n % 16))
    strips, blocks = padded.shape[0] // 16, padded.shape[1] // 32
    lines = padded.reshape(strips, 16, blocks, 8, 4).permute(0, 2, 3, 1, 4).reshape(strips, blocks, 8, 64)
    folded = torch.zeros(strips, blocks, bits, 64, dtype=torch.int32)
    for row, line, right, width, left in _places(bits):
        folded[:, :, row] |= (lines[:, :, line].int() >> right & (1 << width) - 1) << left
    return folded.to(torch.uint8)


def unpack_planes(planes: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes uint8 [n, k] of `pack_planes`."""
    strips, blocks, bits, _ = planes.shape
    lines = torch.zeros(strips, blocks, 8, 64, dtype=torch.int32)
    for row, line, right, width, left in _places(bits):
        lines[:, :, line] |= (planes[:, :, row].int() >> left & (1 << width) - 1) << right
    codes = lines.reshape(strips, blocks, 8, 16, 4).permute(0, 3, 1, 2, 4).reshape(strips * 16, blocks * 32)
    return codes[:n, :k].to(torch.uint8).contiguous()


def segment_length(weight_group: int, input_group: int) -> int:
    """How much of k becomes one exact sum: the longest multiple of 16, at most 256, that divides both groups."""
    both = math.gcd(weight_group, input_group)
    return max(length for length in range(16, 257, 16) if both % length == 0)


def _places(bits: int) -> list[tuple[int, int, int, int, int]]:
    """Where the bits of a code lie: (row of the block, line of 8, first bit in the code, how many, first bit in the
    row). Three bits have a form of their own; other widths are planes of 4, 2 and 1 bits, the lowest one first."""
    if bits == 3:
        whole = [(line // 3, line, 0, 3, line % 3 * 3) for line in range(8) if line % 3 != 2]
        return [*whole, (0, 2, 0, 2, 6), (2, 2, 2, 1, 6), (1, 5, 0, 2, 6), (2, 5, 2, 1, 7)]
    places, first = [], 0
    for width in (4, 2, 1):
        if bits & width:
            in_byte = 8 // width
            places += [
                (first + line // in_byte, line, first, width, line % in_byte * width) for line in range(8)
            ]
            first += width
    return places


def _unsigned_codes(weight: tuple[Any, ...], k: int) -> torch.Tensor:
    """u - offset, int64 [n, k]."""
    codes, _, _, _, table, _, n, bits, _, offset = weight
    if bits == 8:
        return unpack_weight(codes, n, k).long() + 128 - offset
    u = unpack_planes(codes, n, k).long()
    return (u if table is None else table.long()[u]) - offset


def _scales(weight: tuple[Any, ...]) -> tuple[Optional, Optional]:
    """Scale and minimum of each row and group, float32 [n, groups]; None where all are 1 or 0."""
    _, scale, super_scale, minimum, _, _, n, _, _, _ = weight
    if scale is None:
        return None, None
    if super_scale is None:
        small = {torch.uint8: float_of_e8m0, torch.float8_e4m3fn: float_of_e4m3}
        if scale.dtype in small:
            scale = small[scale.dtype](scale.view(torch.uint8))
        values, minima = _rows(scale, n), None if minimum is None else _rows(minimum, n)
        return values, -(values * minima) if minima is not None and minimum.dtype == torch.uint8 else minima
    factors = super_scale.float().repeat_interleave(scale.shape[1] // super_scale.shape[1], 1)
    if factors.shape[2] == 2 and minimum is None:  # bytes that hold both
        scale, minimum = scale & 15, scale >> 4
    values = _rows(factors[:, :, 0], n) * _rows(scale, n)
    return values, None if minimum is None else -(_rows(factors[:, :, 1], n) * _rows(minimum, n))


def _rows(numbers: torch.Tensor, n: int) -> torch.Tensor:
    """[strips, groups, 16] as float32 [n, groups]."""
    return numbers.float().transpose(1, 2).reshape(-1, numbers.shape[1])[:n]


def _input_codes(rows: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [m, groups] and signed codes [m, k] of rows that are finite."""
    m, k = rows.shape
    qmax = MAX_16 if bits == 16 else 127
    padded = F.pad(rows, (0, -k % group)).reshape(-1, group)
    scale, _ = choose_qparams(padded, -qmax, qmax, True)
    steps = torch.round(padded * (1 / scale)[:, None]).clamp(-qmax, qmax).long().reshape(m, -1)[:, :k]
    return scale.reshape(m, -1) if k else torch.ones(m, 1), steps
