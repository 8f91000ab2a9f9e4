# SPDX-License-Identifier: Apache-2.0
"""Finds the factors by which the layers of a model are rescaled against the float model that it was made from.

SmoothQuant's folding and `equalize_` move factors from one layer to another. The whole model computes what it did, but
a layer may read x / a and give y / b where its counterpart reads x and gives y, and nothing in a file says so.

Both factors can be found again. Where a layer's weight is what its scheme makes of its counterpart's, both are 1.
Otherwise the two models run on one batch, and what each quantized layer gives is replaced by the counterpart's output
over b, both with random signs: what the next layer reads then differs from what its counterpart reads by a alone. And b
follows from the weights, for the scheme makes of weight * a the codes of the layer, and scales that are b times the
layer's. A result counts only if the layer's weight then is as close to weight * a / b as rounding brings it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.batches import output_of
from ..base.hooks import hooked
from ..nn import OurLinear, OutlierLinear, PreparedLinear, SmoothedLinear
from ..nn.replacements import matrix_of

ROWS = 512  # of a layer's input that are compared
ROUNDING = 2.0**-12  # relative; what measured factors may be off by, if the dtype is not coarser
AS_CLOSE = 1.1  # times the error of the scheme's own rounding
LESS_CLOSE = (
    2.5  # the same where codes were chosen for the output, which moves weights by more than rounding does
)
MUCH_CLOSER = 2.0  # an error that is smaller by this with factors than without is not explained without them
RUNS, SETTLED = 24, 3  # of both models at most; so many without a change are enough
SWEEPS = 5  # over rows and columns, until their factors settle


@dataclass(frozen=True, eq=False)
class Factors:
    """A layer reads x / input and gives y / output, where its counterpart reads x and gives y.

    input    float32 [k]; None: ones
    output   float32 [n]; None: ones
    """

    input: torch.Tensor | None = None
    output: torch.Tensor | None = None

    @property
    def are_ones(self) -> bool:
        return self.input is None and self.output is None

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer reads where its counterpart reads `x` [..., k], in x's dtype."""
        return x if self.input is None else (x / self.input).to(x.dtype)

    def taken(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer gives where its counterpart gives `y` [..., n]."""
        return y if self.output is None else y / self.output

    def given(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer's output `y` [..., n] is in its counterpart's units, in y's dtype if there is no factor."""
        return y if self.output is None else y.float() * self.output


UNCHANGED = Factors()


class Rescaling:
    """Finds the factors of each quantized layer; None if the factors of a layer cannot be told.

    pairs   {name: (layer of the reference, quantized or prepared layer of the model)}
    """

    def __init__(
        self, reference: nn.Module, model: nn.Module, pairs: Mapping[str, tuple[nn.Module, OurLinear]]
    ):
        self.reference, self.model = reference, model
        self._pairs = {name: _Pair(*pair) for name, pair in pairs.items()}
        self._sought = [pair for pair in self._pairs.values() if not pair.is_plain]

    def look_at(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds the factors of the layers that this batch reaches, if they are not known yet.

        Call it in eval mode, without gradients, and before asking for `factors` of layers that the batch reaches.
        """
        if all(pair.measured is not None for pair in self._sought):
            return
        # Signs are drawn anew for each run, so that a ReLU hides no channel from all of them. Where it hides one from
        # some, what is found is only as right as what was found for the layers before: until nothing changes any more.
        unchanged = 0
        for seed in range(RUNS):
            before = [pair.factors for pair in self._sought]
            self._run_both(args, kwargs, seed)
            is_same = all(map(_are_alike, before, (pair.factors for pair in self._sought)))
            unchanged = unchanged + 1 if is_same else 0
            if unchanged == SETTLED or not any(pair.missed_a_channel for pair in self._sought):
                break

    def _run_both(self, args: tuple, kwargs: dict[str, Any], seed: int) -> None:
        pairs, generator = self._pairs.values(), torch.Generator().manual_seed(seed)
        for pair in pairs:
            pair.generator = generator
        with hooked((pair.reference, pair.on_reference) for pair in pairs):
            output_of(self.reference, args, kwargs)
        with hooked((pair.layer, pair.on_layer) for pair in pairs):
            output_of(self.model, args, kwargs)
        for pair in pairs:
            pair.calls.clear()

    def factors(self, name: str) -> Factors | None:
        return self._pairs[name].factors

    def notes(self) -> list[str]:
        """Sentences for the reader of the figures."""
        rescaled = [name for name, pair in self._pairs.items() if pair.factors and not pair.factors.are_ones]
        trained = [name for name, pair in self._pairs.items() if pair.differs and pair.factors]
        notes = {
            "rescaled against the reference, and compared in its units": rescaled,
            "the weights differ from the reference's by more than rounding": trained,
        }
        return [f"{note}: {', '.join(names)}" for note, names in notes.items() if names]


class _Pair:
    """A layer beside its counterpart, and what is known of its factors."""

    def __init__(self, reference: Any, layer: Any):
        self.reference, self.layer = reference, layer
        self.factors: Factors | None = UNCHANGED
        self.is_plain = not _weight(reference).isfinite().all() or self._is_made_of_it()
        self.differs = False  # by more than rounding and factors
        self.generator: torch.Generator | None = None  # of signs
        self.missed_a_channel = False  # in the last run
        self.measured: torch.Tensor | None = None  # [k], 0 where the channel has been 0 in every row
        self.calls: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # x and y of the reference in this run

    # --- runs -------------------------------------------------------------------------------------------------------

    def on_reference(self, _: nn.Module, args: tuple, kwargs: dict, y: torch.Tensor) -> torch.Tensor:
        y = torch.where(torch.rand(y.shape, generator=self.generator, device=y.device) < 0.5, y, -y)
        self.calls.append((_rows(first_argument(args, kwargs)), y.clone()))
        return y

    def on_layer(self, _: nn.Module, args: tuple, kwargs: dict, y: torch.Tensor) -> torch.Tensor:
        if not self.calls:  # it runs more often here: what compares the models says so
            return y
        x, exact = self.calls.popleft()
        if not self.is_plain:
            self._measure(x, _rows(first_argument(args, kwargs)))
            self.factors = self._find() if self.measured is not None else UNCHANGED
        output = None if self.factors is None else self.factors.output
        return exact.to(y.dtype) if output is None else (exact / output).to(y.dtype)

    def _measure(self, x: torch.Tensor, found: torch.Tensor) -> None:
        if x.shape != found.shape:
            return
        finite = (x.isfinite() & found.isfinite()).all(-1)
        x, found = x[finite].double(), found[finite].double()
        squares = found.square().sum(0)
        is_live = (squares > 0) & (x.square().sum(0) > 1e-10 * x.square().sum(0).mean())
        measured = torch.where(is_live, (x * found).sum(0) / squares, 0.0).float()
        self.missed_a_channel = not is_live.all()
        if self.measured is not None:
            measured = torch.where(is_live, measured, self.measured)
        self.measured = measured

    # --- weights ----------------------------------------------------------------------------------------------------

    def _is_made_of_it(self) -> bool:
        """Whether the layer's weight is what its scheme makes of the counterpart's weight without any factor."""
        weight, target = self._weights(UNCHANGED)
        rounded = _rounded(self.layer, target)[1]
        return bool((weight - rounded).norm() <= ROUNDING * target.norm())

    def is_close(self, factors: Factors) -> bool:
        """Whether the weights agree with `factors` up to rounding."""
        weight, target = self._weights(factors)
        if not target.isfinite().all():  # a channel that almost is 0 has no factor
            return False
        rounded = _rounded(self.layer, target)[1]
        rounding = max(ROUNDING, _eps(self.reference))
        closeness = AS_CLOSE if self.layer.scheme.method.rounds_to_nearest else LESS_CLOSE
        bound = (closeness * (rounded - target).norm()).square() + (rounding * target.norm()).square()
        return bool((weight - target).square().sum() <= bound)

    def _weights(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's weight [n, k] times `output`, and its counterpart's times `input`; they differ by rounding."""
        weight, target = _weight(self.layer), _weight(self.reference)
        weight = weight if factors.output is None else weight * factors.output[:, None]
        return weight, target if factors.input is None else target * factors.input

    def _find(self) -> Factors | None:
        assert self.measured is not None
        known = getattr(self.layer, "smoothing", None) if getattr(self.layer, "is_folded", False) else None
        measured: torch.Tensor | None = self._completed(self.measured)
        if measured is not None and ((measured - 1).abs() <= self._noise).all():
            measured = None
        # What was measured comes first: a weight of few bits may agree with other factors, too.
        for a in (measured, known, None):
            found = Factors(a, self._output_factors(a))
            if self.is_close(found):
                self.differs = False
                return found
        self.differs = True
        plain = Factors(known)
        return None if self._is_rescaled(plain) else plain

    def _is_rescaled(self, factors: Factors) -> bool:
        """Whether weights that were trained, or rounded by other means, were rescaled as well: then factors of rows and
        columns bring them much closer than one factor for all does."""
        weight, target = self._weights(factors)
        n, k = weight.shape
        one = _row_ratio(weight.reshape(1, -1), target.reshape(1, -1))
        fitted = weight
        for _ in range(SWEEPS):
            fitted = fitted * _row_ratio(fitted, target)[:, None]
            fitted = fitted * _row_ratio(fitted.T, target.T)
        # n + k - 1 factors bring any n * k weights closer, by so much:
        by_chance = max(1 - (n + k - 1) / (n * k), 0.0) ** 0.5
        return bool((weight * one - target).norm() * by_chance > MUCH_CLOSER * (fitted - target).norm())

    def _output_factors(self, a: torch.Tensor | None) -> torch.Tensor | None:
        weight, target = self._weights(Factors(a))
        if isinstance(self.layer, PreparedLinear):  # it has the float weight
            b = _row_ratio(weight, target)
        elif len(columns := getattr(self.layer, "outlier_columns", ())):  # they are floats, too
            b = _row_ratio(weight[:, columns], target[:, columns])
        elif (scales := self.layer.row_scales()) is not None:
            b = _rounded(self.layer, target)[0] / scales
        else:
            b = _row_ratio(weight, target)
        b = torch.where(b.isfinite(), b, 1.0)
        return None if bool(((b - 1).abs() <= self._noise).all()) else b

    @property
    def _noise(self) -> float:
        """How far from 1 a factor of 1 may come out, because of rounding."""
        return max(1e-5, 4 * _eps(self.reference))

    def _completed(self, a: torch.Tensor) -> torch.Tensor:
        """`a`, in which the factors of channels that were 0 in all rows are found from the weights."""
        is_live = a != 0
        if is_live.all():
            return a
        weight, target = self._weights(UNCHANGED)
        b = _row_ratio(weight[:, is_live], target[:, is_live] * a[is_live])
        from_weights = _row_ratio(target.T, (weight * b[:, None]).T)
        return torch.where(is_live, a, from_weights)


def _are_alike(one: Factors | None, other: Factors | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(
        a is b or (a is not None and b is not None and torch.allclose(a, b, rtol=1e-5, atol=0))
        for a, b in ((one.input, other.input), (one.output, other.output))
    )


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])[:ROWS].clone()


def _weight(layer: Any) -> torch.Tensor:
    """The matrix by which a layer multiplies its input, float32 [n, k], with the factors that it applies itself."""
    if not isinstance(layer, OurLinear):
        weight = matrix_of(layer)
    elif isinstance(layer, PreparedLinear):
        weight = layer.float_weight() if getattr(layer, "is_folded", False) else layer.weight_matrix
    else:
        weight = layer.dequantize()
    return weight.detach().float()


def _eps(layer: Any) -> float:
    dtype = torch.float32 if isinstance(layer, OurLinear) else layer.weight.dtype
    return torch.finfo(dtype).eps


def _rounded(layer: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the scheme of `layer` would make of `weight` [n, k]: scales [n], and the weight that the codes stand for."""
    if isinstance(layer, PreparedLinear):
        return torch.ones(len(weight), device=weight.device), weight
    multiplier = (
        layer.input_multiplier.detach() if isinstance(layer, SmoothedLinear) else torch.ones((), device="cpu")
    )
    columns = (
        layer.outlier_columns
        if isinstance(layer, OutlierLinear)
        else torch.tensor([], dtype=torch.int64, device="cpu")
    )
    coded = (weight / multiplier).index_fill(1, columns, 0.0)
    q = layer.scheme.method.qparams(layer.scheme.weights, coded)
    rounded = q.quantize(coded).dequantize() * multiplier
    rounded[:, columns] = weight[:, columns]
    return q.scale.float().reshape(-1), rounded


def _row_ratio(weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """b [n] with which b * weight is closest to target [n, k]; 1 for rows of zeros."""
    squares = weight.square().sum(1)
    return torch.where(squares > 0, (weight * target).sum(1) / squares.clamp_min(1e-38), 1.0)
