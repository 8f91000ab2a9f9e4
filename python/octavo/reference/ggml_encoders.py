# SPDX-License-Identifier: Apache-2.0
"""Floats to the parts of GGML's blocks, type by type: the codes of ggml, byte for byte.

x is float32 [blocks, elements]; `importance`, of the same shape, may be None; `mean_square` [blocks, 1] is that of the
row of the weight which a block is a part of. Source: ggml 0.25, ggml-quants.c; docs/numerics.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .ggml_blocks import FLOAT4_VALUES, IQ4_VALUES, BlockParts, BlockType, float_of_e4m3, float_of_e8m0
from .ggml_searches import (
    MANY_TRIALS,
    SMALLEST_MAGNITUDE,
    as_float32,
    in_order,
    inverse,
    nearest_int,
    root,
    search_affine,
    search_by_descent,
    search_positive,
    search_signed,
    signed_extreme,
)

Optional = torch.Tensor | None


class BlockInput(NamedTuple):
    """What becomes blocks."""

    x: torch.Tensor
    importance: Optional
    mean_square: torch.Tensor

    def groups(self, size: int) -> tuple[torch.Tensor, Optional]:
        """x and importance as [blocks * groups, size]."""
        return self.x.reshape(-1, size), None if self.importance is None else self.importance.reshape(
            -1, size
        )


def encoded(kind: BlockType, given: BlockInput) -> BlockParts:
    """The parts of the blocks that `given` becomes."""
    levels = {"Q4_0": 8, "Q5_0": 16}
    tops = {"Q4_1": 15, "Q5_1": 31}
    if kind.name in levels:
        return _symmetric(given, levels[kind.name])
    if kind.name in tops:
        return _affine(given, tops[kind.name])
    if kind.scales in ("e8m0", "e4m3"):
        return _float4(kind, given)
    if kind.values:
        return _table(kind, given)
    if kind.has_minimum:
        return _affine_groups(kind, given)
    if kind.two_levels:
        return _symmetric_groups(kind, given)
    return _plain(kind, given.x)


def _parts(codes: torch.Tensor, *halves: torch.Tensor) -> BlockParts:
    columns = [each.reshape(-1, 1).half() for each in halves]
    nothing = torch.zeros(len(codes), 0, dtype=torch.uint8)
    joined = torch.cat(columns, 1) if columns else nothing.half()
    return BlockParts(codes.to(torch.uint8), joined, nothing, nothing)


def _weighted(given: BlockInput, importance: torch.Tensor) -> torch.Tensor:
    return importance * root(given.mean_square + given.x * given.x)


# --- one scale for a block --------------------------------------------------------------------------------------------


def _symmetric(given: BlockInput, levels: int) -> BlockParts:
    x = given.x
    if given.importance is not None:
        return _parts(*search_signed(x, _weighted(given, given.importance), levels))
    scale = signed_extreme(x)[:, None] / -levels
    return _parts((x * inverse(scale) + (levels + 0.5)).int().clamp_max(2 * levels - 1), scale)


def _affine(given: BlockInput, top: int) -> BlockParts:
    x = given.x
    if given.importance is not None:
        fit = search_affine(x, _weighted(given, given.importance), top, MANY_TRIALS)
        return _parts(fit.codes, fit.scale, -fit.minimum)
    low = x.amin(1, keepdim=True)
    scale = (x.amax(1, keepdim=True) - low) / top
    return _parts(((x - low) * inverse(scale) + 0.5).int().clamp_max(top), scale, low)


def _plain(kind: BlockType, x: torch.Tensor) -> BlockParts:
    magnitude = x.abs().amax(1, keepdim=True)
    if kind.name == "Q1_0":
        return _parts(2 * (x >= 0), in_order(x.abs()) / 128)
    scale = magnitude / 127 if kind.name == "Q8_0" else magnitude
    steps = x * inverse(scale)
    size = steps.abs()
    away = size.floor() + (2 * size.frac()).floor()  # halves away from zero
    return _parts((away * steps.sign()).int() + kind.offset, scale)


# --- scales on two levels ---------------------------------------------------------------------------------------------


def _requantized(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> torch.Tensor:
    """Steps of the nearest values of scale * step - minimum; groups whose scale is 0 keep their codes."""
    steps = nearest_int((x + minimum) / torch.where(scale == 0, 1.0, scale))
    return torch.where(scale == 0, codes, steps)


def _group_weights(x: torch.Tensor, importance: torch.Tensor, size: int, factor: float) -> torch.Tensor:
    """im * sqrt(factor * mean square of the block + x^2), [blocks * groups, size]."""
    mean_square = factor * in_order(x * x) / x.shape[1]
    return (importance.reshape(x.shape) * root(mean_square[:, None] + x * x)).reshape(-1, size)


def _affine_groups(kind: BlockType, given: BlockInput) -> BlockParts:
    top, is_coarse = (1 << kind.bits) - 1, kind.name == "Q2_K"
    largest = 15 if is_coarse else 63
    x, importance = given.groups(kind.group)
    if importance is not None:
        w = _group_weights(given.x, importance, kind.group, 1 if is_coarse else 2)
        fit = search_affine(x, w, top, MANY_TRIALS)
    else:
        base = torch.zeros(()) if is_coarse else root(in_order(x * x) / kind.group)[:, None]
        trials = (-1.0, 0.1, 20) if kind.name == "Q4_K" else (-0.5, 0.1, 15)
        fit = search_affine(x, base + x.abs(), top, trials, absolute=is_coarse)
    numbers = [each.reshape(-1, kind.groups) for each in (fit.scale, fit.minimum)]
    if importance is not None:
        sums = in_order(w).reshape(-1, kind.groups)
        pairs = [search_positive(each, sums, largest) for each in numbers]
    else:
        pairs = [_integers(each, largest) for each in numbers]
    (scale, d), (minimum, m) = pairs
    halves = [each.half().float()[:, None] for each in (d, m)]
    own = [(half * integers).reshape(-1, 1) for half, integers in zip(halves, (scale, minimum), strict=True)]
    codes = _requantized(x, fit.codes, *own).clamp(0, top).reshape(given.x.shape)
    parts = _parts(codes, d, m)._replace(scale=scale.to(torch.uint8), minimum=minimum.to(torch.uint8))
    if is_coarse:
        parts = parts._replace(scale=parts.scale | parts.minimum << 4, minimum=parts.minimum[:, :0])
    return parts


def _integers(numbers: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers as integers 0 .. largest, against the largest of a row, and what a step is worth."""
    top = numbers.amax(1).clamp_min(0)
    factor = torch.where(top > 0, as_float32(largest) / top, 0.0)[:, None]
    return nearest_int(factor * numbers).clamp_max(largest), torch.where(top > 0, top / largest, 0.0)


def _symmetric_groups(kind: BlockType, given: BlockInput) -> BlockParts:
    x, importance = given.groups(16)
    levels = kind.offset
    if kind.name == "Q3_K" and importance is not None:
        w = _group_weights(given.x, importance, 16, 2)
        codes, scales = search_signed(x, w, levels)
        shifted, d = search_signed(scales.reshape(-1, 16), in_order(w).reshape(-1, 16), 32)
        integers = shifted - 32
    else:
        if kind.name == "Q3_K":
            codes, scales = search_by_descent(x, levels)
        else:
            codes, scales = search_signed(x, x * x if importance is None else importance, levels)
        integers, d = _signed_integers(scales.reshape(-1, 16), 32 if kind.name == "Q3_K" else 128)
    own = (d.half().float()[:, None] * integers).reshape(-1, 1)
    steps = _requantized(x, codes - levels, own, torch.zeros(())).clamp(-levels, levels - 1)
    parts = _parts((steps + levels).reshape(given.x.shape), d)
    if kind.name == "Q6_K":  # ggml clears the whole block
        parts = parts._replace(codes=parts.codes.masked_fill((d == 0)[:, None], 0))
        integers = integers.masked_fill((d == 0)[:, None], 0)
    return parts._replace(scale=(integers & 255).to(torch.uint8))


def _signed_integers(scales: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as integers -largest .. largest - 1, against the one of the largest magnitude, and what a step is worth.
    If all are 0 the integers are -largest, as ggml leaves them."""
    extreme = signed_extreme(scales)[:, None]
    is_zero = extreme.abs() < SMALLEST_MAGNITUDE
    factor = as_float32(-largest) / torch.where(is_zero, 1.0, extreme)
    integers = nearest_int(factor * scales).clamp(-largest, largest - 1)
    return torch.where(is_zero, -largest, integers), torch.where(is_zero, 0.0, 1 / factor)[:, 0]


# --- codes that are places in a table ---------------------------------------------------------------------------------


def _nearest_iq4(x: torch.Tensor) -> torch.Tensor:
    """The place of the nearest value, of two the higher one."""
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32)
    high = torch.bucketize(x, values, right=True).clamp(1, 15)
    return torch.where(x - values[high - 1] < values[high] - x, high - 1, high)


def _table(kind: BlockType, given: BlockInput) -> BlockParts:
    x, importance = given.groups(32)
    w = x * x
    if importance is not None:
        w = _group_weights(given.x, importance, 32, 2)
    scale = _search_iq4(x, w)
    if not kind.two_levels:
        return _parts(_nearest_iq4(inverse(scale)[:, None] * x), scale)
    d = -signed_extreme(scale.reshape(-1, 8)) / 32
    integers = nearest_int(inverse(d)[:, None] * scale.reshape(-1, 8)).clamp(-32, 31)
    own = (d[:, None] * integers).reshape(-1, 1)
    codes = _nearest_iq4(inverse(own) * x).reshape(given.x.shape)
    return _parts(codes, d)._replace(scale=(integers & 255).to(torch.uint8))


def _search_iq4(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The scales [rows]: 16 candidates, each fitted by least squares."""
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32)
    extreme = signed_extreme(x)[:, None]
    safe = torch.where(extreme == 0, 1.0, extreme)

    def fit(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = values[_nearest_iq4(factor * x)]
        return in_order(w * value * x), in_order(w * value * value)

    xl, ll = fit(1 / (-safe / IQ4_VALUES[0]))
    scale = xl / ll
    best = scale * xl
    for trial in range(-7, 8):
        xl, ll = fit(as_float32(trial + IQ4_VALUES[0]) / safe)
        is_better = (ll > 0) & (xl * xl > best * ll)
        scale = torch.where(is_better, xl / ll, scale)
        best = torch.where(is_better, scale * xl, best)
    return scale.masked_fill(extreme[:, 0].abs() < SMALLEST_MAGNITUDE, 0.0)


def _float4(kind: BlockType, given: BlockInput) -> BlockParts:
    x, _ = given.groups(kind.group)
    magnitude = x.abs().amax(1)
    if kind.scales == "e8m0":
        exponent = torch.where(magnitude > 0, magnitude.log2().floor() - 2 + 127, 0).clamp_min(0)
        scale = exponent.to(torch.uint8)
        unit = float_of_e8m0(scale) / 2
    else:
        scale = _e4m3_of(magnitude / 6)
        unit = float_of_e4m3(scale) / 2
    values = torch.tensor(FLOAT4_VALUES, dtype=torch.float32)
    off = (unit[:, None, None] * values - x[:, :, None]).abs()
    is_least = off == off.amin(-1, keepdim=True)
    codes = (is_least.cumsum(-1) == 0).sum(-1)  # the first one
    parts = _parts(codes.reshape(given.x.shape))
    return parts._replace(scale=scale.reshape(len(given.x), -1))


def _e4m3_of(x: torch.Tensor) -> torch.Tensor:
    """The nearest float with 4 bits of exponent and 3 of fraction, halves up; from 248 on 448, as ggml has it."""
    x = x.clamp(0, 448)
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 120
    normal = (exponent << 3 | bits >> 20 & 7) + (bits >> 19 & 1)
    normal = torch.where(normal >= 15 << 3, 0x7E, normal)
    small = (x * 512 + 0.5).int().clamp(0, 7)
    return torch.where(exponent <= 0, small, normal).to(torch.uint8)
