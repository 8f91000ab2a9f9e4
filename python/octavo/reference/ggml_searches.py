# SPDX-License-Identifier: Apache-2.0
"""How ggml searches for scales of groups: candidates are tried, each is fitted by least squares, the best one stays.

Rows x [rows, count] are groups. Each sum is added up in float32 in the order of the elements, as ggml does, whose codes
these are. Source: ggml 0.25, ggml-quants.c; docs/numerics.md says it in formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SMALLEST_MAGNITUDE = 1e-15  # groups below it are all zeros
MANY_TRIALS = (-0.9, 0.05, 36)


def in_order(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis, from the first term on."""
    total = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        total = total + terms[..., i]
    return total


def nearest_int(x: torch.Tensor) -> torch.Tensor:
    """Half to even, for |x| below 2^22; beyond, what ggml gives."""
    return ((x + 12582912.0).view(torch.int32) & 0x7FFFFF) - 0x400000


def signed_extreme(x: torch.Tensor) -> torch.Tensor:
    """The element of the largest magnitude, with its sign; of several the first one."""
    is_largest = x.abs() == x.abs().amax(-1, keepdim=True)
    first = is_largest & (is_largest.cumsum(-1) == 1)
    return torch.where(first, x, 0.0).sum(-1)


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def root(x: torch.Tensor) -> torch.Tensor:
    """The square root, rounded correctly, as that of torch in float32 is not."""
    return x.double().sqrt().float()


def _fit(x: torch.Tensor, w: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of w * x * level and w * level * level."""
    return in_order(w * x * levels), in_order(w * levels * levels)


def search_signed(x: torch.Tensor, w: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x = scale * (code - levels). Returns codes 0 .. 2 * levels - 1 and scales [rows]."""
    extreme = signed_extreme(x)[:, None]
    safe = torch.where(extreme == 0, 1.0, extreme)

    def level_of(factor: torch.Tensor) -> torch.Tensor:
        return nearest_int(factor * x).clamp(-levels, levels - 1)

    best_inverse = as_float32(-levels) / safe
    xl, ll = _fit(x, w, level_of(best_inverse).float())
    scale = torch.where(ll != 0, xl / ll, 0.0)
    best = scale * xl
    for step in (*range(-9, 0), *range(1, 10)):
        tried = -(float(levels) + as_float32(0.1) * step) / safe
        xl, ll = _fit(x, w, level_of(tried).float())
        is_better = (ll > 0) & (xl * xl > best * ll)
        best_inverse = torch.where(is_better[:, None], tried, best_inverse)
        scale = torch.where(is_better, xl / ll, scale)
        best = torch.where(is_better, scale * xl, best)
    is_zero = extreme.abs() < SMALLEST_MAGNITUDE
    return torch.where(is_zero, 0, level_of(best_inverse) + levels), scale.masked_fill(is_zero[:, 0], 0.0)


def search_by_descent(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As search_signed with weights x^2: one start, from which codes move one by one."""
    extreme = signed_extreme(x)[:, None]
    start = nearest_int(as_float32(-levels) / torch.where(extreme == 0, 1.0, extreme) * x).clamp(
        -levels, levels - 1
    )
    codes, scale = _descend(x, x * x, start, -levels, levels - 1, needs_rest=False)
    is_zero = extreme.abs() < SMALLEST_MAGNITUDE
    return torch.where(is_zero, 0, codes + levels), scale.masked_fill(is_zero[:, 0], 0.0)


def search_positive(x: torch.Tensor, w: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x = scale * code for numbers that are not negative. Returns codes 0 .. top and scales [rows]."""
    largest = x.amax(1, keepdim=True).clamp_min(0)
    safe = torch.where(largest == 0, 1.0, largest)

    def error_of(factor: torch.Tensor) -> torch.Tensor:
        off = x - 1 / factor * nearest_int(factor * x).clamp_max(top)
        return in_order(w * off * off)

    best = as_float32(top) / safe
    least = error_of(best)
    for step in (*range(-4, 0), *range(1, 5)):
        tried = (as_float32(0.1) * step + top) / safe
        error = error_of(tried)
        best = torch.where((error < least)[:, None], tried, best)
        least = torch.minimum(error, least)
    start = nearest_int(best * x).clamp_max(top)
    codes, scale = _descend(x, w, start, -(1 << 22), top, needs_rest=True)
    is_zero = largest < SMALLEST_MAGNITUDE
    return torch.where(is_zero, 0, codes), scale.masked_fill(is_zero[:, 0], 0.0)


def _descend(
    x: torch.Tensor, w: torch.Tensor, codes: torch.Tensor, low: int, high: int, needs_rest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each code moves to where it is best while the others stay, five times through all. Returns codes and scales."""
    xl, ll = _fit(x, w, codes.float())
    codes = codes.clone()
    for i in [*range(x.shape[1])] * 5:
        own_x, own_w, own = x[:, i], w[:, i], codes[:, i].float()
        rest_xl, rest_ll = xl - own_w * own_x * own, ll - own_w * own * own
        level = nearest_int(own_x * rest_ll / rest_xl).clamp(low, high)
        new_xl = rest_xl + own_w * own_x * level
        new_ll = rest_ll + own_w * level * level
        moves = (
            (rest_xl > 0) & (new_ll > 0) & (new_xl * new_xl * ll > xl * xl * new_ll) & (level != codes[:, i])
        )
        if needs_rest:
            moves &= rest_ll > 0
        codes[:, i] = torch.where(moves, level, codes[:, i])
        xl, ll = torch.where(moves, new_xl, xl), torch.where(moves, new_ll, ll)
    return codes, torch.where(ll > 0, xl / ll, 0.0)


class AffineFit(NamedTuple):
    """x = scale * code - minimum."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def search_affine(
    x: torch.Tensor, w: torch.Tensor, top: int, trials: tuple[float, float, int], absolute: bool = False
) -> AffineFit:
    """Codes 0 .. top and minima that are not negative; the error is the sum of w * |off|, or of w * off^2.

    trials   (first, step, last): the range is cut into top + first + i * step for i = 0 .. last
    """
    low, high = x.amin(1).clamp_max(0), x.amax(1)
    sum_w, sum_x = in_order(w), in_order(w * x)
    is_flat = high <= low
    flat_low = low
    high = torch.where(is_flat, low + 1, high)

    def codes_for(levels: torch.Tensor) -> torch.Tensor:
        factor = levels / (high - low)
        return nearest_int(factor[:, None] * (x - low[:, None])).clamp(0, top).float()

    def error_of(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        off = scale[:, None] * codes + minimum[:, None] - x
        return in_order(w * (off.abs() if absolute else off * off))

    scale = 1 / (as_float32(top) / (high - low))
    codes = codes_for(torch.tensor(float(top)))
    least = error_of(codes, scale, low)
    first, step, last = trials
    for i in range(last + 1):
        tried = codes_for(as_float32(first) + as_float32(step) * i + top)
        sum_l, sum_ll, sum_xl = in_order(w * tried), in_order(w * tried * tried), in_order(w * tried * x)
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        new_scale = torch.where(new_low > 0, sum_xl / sum_ll, new_scale)
        new_low = new_low.clamp_max(0)
        error = error_of(tried, new_scale, new_low)
        is_better = (determinant > 0) & (error < least)
        codes = torch.where(is_better[:, None], tried, codes)
        least = torch.where(is_better, error, least)
        scale, low = torch.where(is_better, new_scale, scale), torch.where(is_better, new_low, low)
    codes = torch.where(is_flat[:, None], 0.0, codes)
    return AffineFit(codes.int(), scale.masked_fill(is_flat, 0.0), -torch.where(is_flat, flat_low, low))


def as_float32(number: float) -> torch.Tensor:
    """A float32, so that numbers are rounded as those of C. Of a plain number, torch would multiply with 1 / x where
    number / x is written."""
    return torch.tensor(number, dtype=torch.float32)
