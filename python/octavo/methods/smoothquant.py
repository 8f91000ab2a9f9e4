# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outliers of the input are moved into the weight, where they do less harm, before both are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ..nn import (
    PreparedLinear,
    PreparedSmoothed,
    QuantLinear,
    SmoothedLinear,
    StaticQuantLinear,
    StaticSmoothedLinear,
)
from .base import Method, RoundToNearest
from .smoothing import smoothing
from .statistics import Positions

FoldChoice = bool | tuple[tuple[str, tuple[str, ...]], ...]
LAYERS: dict[type[QuantLinear], type[SmoothedLinear]] = {
    QuantLinear: SmoothedLinear,
    StaticQuantLinear: StaticSmoothedLinear,
}


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Each input channel is divided by an s, its weights are multiplied by it; then both are quantized.

    alpha    in [0, 1]: how much of a channel's range goes into the weights. Several, such as (0.3, 0.5, 0.7): for each
             layer the one whose output is closest, on some rows of the data, is taken
    fold     True: a layer before that can absorb 1 / s does, a norm or a linear layer, if everything that reads its
             output is smoothed alike; it costs nothing then. Which layers do is found while calibrating: what reads
             the output in a branch that no batch takes is not seen. A mapping {"norm": ["q", "k", "v"]} says it
             instead, and only those are folded. False: every layer multiplies its input
    With Int8Static the data is run twice.
    source   Xiao et al. 2023 (arXiv:2211.10438), eq. 4; docs/numerics.md, eq. 36 and 37
    """

    alpha: float | tuple[float, ...] = 0.5
    fold: Any = True

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _alpha(self.alpha))
        object.__setattr__(self, "fold", _fold(self.fold))

    @property
    def alphas(self) -> tuple[float, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def keeps_sample(self) -> bool:
        """Whether rows of the input are needed, to choose among several alphas."""
        return len(self.alphas) > 1

    def reason_to_refuse(self, scheme: Any) -> str:
        if scheme.activations.layer in LAYERS:
            return ""
        return f"SmoothQuant does not go with {scheme.name}, whose layers read some columns apart"

    def passes(self, scheme: Any) -> int:
        return 2 if scheme.activations.needs_data else 1

    def prepared(self, scheme: Any) -> type[PreparedLinear]:
        return PreparedSmoothed

    def layer(self, scheme: Any) -> type[QuantLinear]:
        return LAYERS[scheme.activations.layer]

    @classmethod
    @contextmanager
    def watching(
        cls, model: nn.Module, layers: Sequence[Any], *, in_place: bool, positions: Positions | None = None
    ) -> Iterator[None]:
        with smoothing(model, layers, in_place=in_place):
            yield

    def frozen_scheme(self, prepared: Any) -> Any:
        """The scheme without SmoothQuant if another module smooths the inputs; else the layer smooths them itself."""
        return replace(prepared.scheme, method=RoundToNearest()) if prepared.is_folded else prepared.scheme

    def finish_(self, layer: Any, prepared: Any) -> None:
        if isinstance(layer, SmoothedLinear):
            layer.set_input_multiplier_(prepared.input_multiplier)


def _alpha(value: Any) -> float | tuple[float, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    alphas = tuple(value) if several else (value,)
    if not alphas or not all(isinstance(a, int | float) and 0 <= a <= 1 for a in alphas):
        raise ValueError(f"SmoothQuant: alpha must be a number in [0, 1] or several of them, got {value!r}")
    return tuple(map(float, alphas)) if several else float(value)


def _fold(value: Any) -> FoldChoice:
    """A mapping as sorted pairs, so that methods can be compared and hashed; JSON has lists for tuples."""
    if isinstance(value, bool):
        return value
    try:
        pairs = sorted(dict(value).items())
        fold = tuple(
            (name, (layers,) if isinstance(layers, str) else tuple(layers)) for name, layers in pairs
        )
    except (TypeError, ValueError):
        fold = ()
    names = [name for before, after in fold for name in (before, *after)]
    if not fold or not all(isinstance(name, str) for name in names):
        raise TypeError(
            'SmoothQuant: fold must be True, False or a mapping of names such as {"norm": ["q", "k", "v"]}, '
            f"got {value!r}"
        )
    return fold
