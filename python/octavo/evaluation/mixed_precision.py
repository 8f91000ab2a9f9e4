# SPDX-License-Identifier: Apache-2.0
"""One scheme for each layer, under a budget: the least summed figure for a size, or the least size for a figure.

Each layer is a list of options of some size and figure, and both add up. Layer after layer, the partial sums that no
other one beats in both are kept, which is exact. A price for each byte, the same for all layers, gives a choice that is
nearly as good and a bound that leaves few of the sums; if they get too many all the same, that choice is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

from ..base.sizes import bytes_of
from ..schemes import Scheme
from .sensitivities import LayerSensitivity, Sensitivity

EXACT_SUMS = 2000  # kept at a time, which bounds the time; 224 layers of Llama's shapes stay below it
ROUNDING = 1 + 1e-9  # of the bound, whose terms are added in another order than the sums
BISECTIONS = 100


def choose(
    sensitivity: Sensitivity, budget: float | str | None = None, *, error: float | None = None
) -> dict[str, Scheme | None]:
    """The scheme of each layer under a size or an error, as the dict that `quantize_` takes; None keeps it in float.

    budget  bytes of the weights of all layers in `sensitivity`, as its packed_bytes count them, or a text such as
            "8 kB", "1.5 MB" (10^6 bytes) or "2 MiB" (2^20): the least sum of figures that fits
    error   instead of a budget, a sum of figures, in the figure's unit: the fewest bytes that keep to it

    Figures of single layers are added, which is an approximation: `evaluate` says what the mix does. Rows whose figure
    is NaN or infinite are never chosen. Exact as long as at most 2000 partial sums may still become the best; beyond
    that the best on the convex hull of all sums.

    Raises: TypeError unless one of the two is given, and for what is no number; ValueError for a text that is no size,
    and for a limit that cannot be met, naming the least possible.
    Source: Dong et al. 2020 (HAWQ-V2, arXiv:1911.03852), the sum over layers under a size; a price for each byte:
    Shoham and Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers.
    """
    if (budget is None) == (error is None):
        raise TypeError("choose: give one of budget=... (in bytes) and error=... (in the figure's unit)")
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"choose: sensitivity is {type(sensitivity).__name__}; give what octavo.sensitivity(model, data, schemes) "
            "returned"
        )
    layers = [_options(name, rows) for name, rows in sensitivity.layers.items()]
    least_bytes = sum(options[0].packed_bytes for options in layers)
    least_error = _summed(options[-1] for options in layers)[1]
    if budget is not None:
        limits = _Limits(bytes_of(budget, "choose: budget"), math.inf, lowest_figure=True)
        _require("budget", limits.bytes, least_bytes)
    else:
        if not isinstance(error, Real) or isinstance(error, bool):
            raise TypeError(f"choose: error is {error!r}; a number in the figure's unit is needed")
        limits = _Limits(math.inf, float(error), lowest_figure=False)
        _require("error", error, least_error)
    return {row.name: row.scheme for row in _best(layers, limits)}


@dataclass(frozen=True)
class _Limits:
    bytes: float
    error: float
    lowest_figure: bool  # wanted within the limits; else the fewest bytes

    def fits(self, chosen: list[LayerSensitivity]) -> bool:
        packed_bytes, figure = _summed(chosen)
        return packed_bytes <= self.bytes and figure <= self.error


def _require(argument: str, value: float, least: float) -> None:
    if not value >= least:  # NaN is refused, too
        raise ValueError(f"choose: {argument} is {value}, the least possible is {least}; give at least that")


def _options(name: str, rows: list[LayerSensitivity]) -> list[LayerSensitivity]:
    options = _undominated(row for row in rows if math.isfinite(row.figure))
    if not options:
        raise ValueError(
            f"choose: {name!r} has no row with a finite figure; give it one, or take its rows out"
        )
    return options


def _undominated(choices: Iterable[Any]) -> list[Any]:
    """The options that no other one beats in bytes and figure, one of equal ones; bytes rise and figures fall."""
    kept: list[Any] = []
    for each in sorted(choices, key=lambda each: (each.packed_bytes, each.figure)):
        if not kept or each.figure < kept[-1].figure:
            kept.append(each)
    return kept


def _summed(rows: Iterable[LayerSensitivity]) -> tuple[int, float]:
    """The sums of bytes and of figures, added in the order of `_exact`: a sum that errors call possible must be so."""
    packed_bytes, figure = 0, 0.0
    for row in rows:
        packed_bytes, figure = packed_bytes + row.packed_bytes, figure + row.figure
    return packed_bytes, figure


def _best(layers: list[list[LayerSensitivity]], limits: _Limits) -> list[LayerSensitivity]:
    finest, smallest = [options[-1] for options in layers], [options[0] for options in layers]
    wanted, safe = (finest, smallest) if limits.lowest_figure else (smallest, finest)
    if limits.fits(wanted):
        return wanted
    priced, price = _priced(layers, limits, safe)
    exact = _exact(layers, limits, priced, price)
    return priced if exact is None else exact


# --- by a price for each byte ---------------------------------------------------------------------------------------


def _priced(
    layers: list[list[LayerSensitivity]], limits: _Limits, safe: list[LayerSensitivity]
) -> tuple[list[LayerSensitivity], float]:
    """The best of the choices in which every layer has its least figure + price * bytes, and that price.

    A higher price never means more bytes or a lower figure, so bisection finds where the limits begin to be met.
    """
    slopes = [
        (one.figure - next_one.figure) / (next_one.packed_bytes - one.packed_bytes)
        for options in layers
        for one, next_one in pairwise(options)
    ]
    # At low every layer takes its last option, at high its first.
    low, high = min(slopes) / 2, 2 * max(slopes)
    for _ in range(BISECTIONS):
        price = math.sqrt(low * high)
        chosen = [min(options, key=lambda row: _cost(row, price)) for options in layers]
        fits = limits.fits(chosen)
        safe = chosen if fits else safe
        low, high = (low, price) if fits == limits.lowest_figure else (price, high)
    return safe, price


def _cost(choice: LayerSensitivity | _Sum, price: float) -> float:
    return choice.figure + price * choice.packed_bytes


# --- exact ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sums of the first layers. `row` is the choice for the last of them, `before` holds the others."""

    packed_bytes: int = 0
    figure: float = 0.0
    row: LayerSensitivity | None = None
    before: _Sum | None = None

    def rows(self) -> list[LayerSensitivity]:
        rows, each = [], self
        while each.row is not None and each.before is not None:
            rows.append(each.row)
            each = each.before
        return rows[::-1]


def _exact(
    layers: list[list[LayerSensitivity]], limits: _Limits, known: list[LayerSensitivity], price: float
) -> list[LayerSensitivity] | None:
    """The best choice, by dynamic programming over the undominated sums; None if they get too many.

    Whatever follows costs at least each layer's least figure + price * bytes. A sum that with this cannot be as good as
    `known` within the limits is dropped.
    """
    known_bytes, known_figure = _summed(known)
    size, figure = (limits.bytes, known_figure) if limits.lowest_figure else (known_bytes, limits.error)
    most = (figure + price * size) * ROUNDING
    least_costs = [min(_cost(row, price) for row in options) for options in layers]
    sums = [_Sum()]
    for i, options in enumerate(layers):
        bytes_after = sum(options[0].packed_bytes for options in layers[i + 1 :])
        cost_after = sum(least_costs[i + 1 :])
        longer = (
            _Sum(each.packed_bytes + row.packed_bytes, each.figure + row.figure, row, each)
            for each in sums
            for row in options
        )
        sums = _undominated(
            each
            for each in longer
            if each.packed_bytes + bytes_after <= limits.bytes
            and each.figure <= limits.error
            and _cost(each, price) + cost_after <= most
        )
        if len(sums) > EXACT_SUMS:
            return None
    return sums[-1 if limits.lowest_figure else 0].rows()
