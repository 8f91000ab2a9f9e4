# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outliers of the input are moved into the weight, where they do less harm, before both are quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..base import configs
from ..formats import WeightFormat
from ..nn import (
    PreparedLinear,
    PreparedSmoothed,
    QuantLinear,
    SmoothedLinear,
    StaticQuantLinear,
    StaticSmoothedLinear,
)
from ..tensors.qparams import QParams, QuantizedTensor
from .base import Method
from .clip_search import default_method
from .smoothing import smoothing
from .statistics import Positions, inputs_recorded

FoldChoice = bool | tuple[tuple[str, tuple[str, ...]], ...]
LAYERS: dict[type[QuantLinear], type[SmoothedLinear]] = {
    QuantLinear: SmoothedLinear,
    StaticQuantLinear: StaticSmoothedLinear,
}


@dataclass(frozen=True)
class ChannelMethod(Method, ABC):
    """A method that multiplies the columns of a weight by factors s, while its input is divided by them, and leaves it
    to another one, `then`, to choose the codes of what comes out.

    then   RoundToNearest(), ClipSearch(), HQQ() or GPTQ(); None: what schemes of the format have without a method
    """

    then: Any = field(default=None, kw_only=True)

    needs_data: ClassVar[bool] = True
    keeps_sample: ClassVar[bool] = False  # whether rows of the input are needed to find s

    def __post_init__(self) -> None:
        if self.then is not None:
            then = configs.instance(f"{self.name}: then", Method, self.then, "octavo.GPTQ() and the like")
            if isinstance(then, ChannelMethod):
                raise ValueError(
                    f"{self.name}: then is {then.name}, and both multiply the columns of a weight; take one of them"
                )
            object.__setattr__(self, "then", then)

    @classmethod
    @abstractmethod
    @contextmanager
    def watching(
        cls, model: nn.Module, layers: Sequence[Any], *, in_place: bool, positions: Positions | None = None
    ) -> Iterator[None]:
        """As Method has it; on leaving, the factors of `layers` are chosen."""
        yield

    def then_for(self, weights: WeightFormat) -> Method:
        """The method that chooses the codes of `weights`."""
        return default_method(weights) if self.then is None else self.then

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        return self.then is not None and self.then.is_sequential

    @property
    def rounds_to_nearest(self) -> bool:  # type: ignore[override]
        return self.then is None or self.then.rounds_to_nearest

    def reason_to_refuse(self, scheme: Any) -> str:
        if scheme.activations.layer in LAYERS:
            return self.then_for(scheme.weights).reason_to_refuse(scheme)
        return f"{self.name} does not go with {scheme.name}, whose layers read some columns apart"

    def passes(self, scheme: Any) -> int:
        return 2 if scheme.activations.needs_data else 1

    def prepared(self, scheme: Any) -> type[PreparedLinear]:
        return PreparedSmoothed

    def layer(self, scheme: Any) -> type[QuantLinear]:
        return LAYERS[scheme.activations.layer]

    def qparams(self, weights: WeightFormat, weight: torch.Tensor) -> QParams:
        return self.then_for(weights).qparams(weights, weight)

    def require_ready(self, prepared: Any) -> None:
        self.then_for(prepared.scheme.weights).require_ready(prepared)

    def choose_codes(self, prepared: Any) -> QuantizedTensor:
        return self.then_for(prepared.scheme.weights).choose_codes(prepared)

    def frozen_scheme(self, prepared: Any) -> Any:
        """The scheme without this method if another module divides the inputs; else the layer does it itself."""
        scheme = prepared.scheme
        return replace(scheme, method=self.then_for(scheme.weights)) if prepared.is_folded else scheme

    def finish_(self, layer: Any, prepared: Any) -> None:
        if isinstance(layer, SmoothedLinear):
            layer.set_input_multiplier_(prepared.input_multiplier)


def unsmoothed(layers: Sequence[Any]) -> list[Any]:
    """Those of `layers` that still read what the float model gives them."""
    return [layer for layer in layers if not layer.is_smoothed]


@dataclass(frozen=True)
class SmoothQuant(ChannelMethod):
    """Each input channel is divided by an s, its weights are multiplied by it; then both are quantized.

    alpha    in [0, 1]: how much of a channel's range goes into the weights. Several, such as (0.3, 0.5, 0.7): for each
             layer the one whose output is closest, on some rows of the data, is taken
    fold     True: a layer before that can absorb 1 / s does, a norm or a linear layer, if everything that reads its
             output is smoothed alike; it costs nothing then. Which layers do is found while calibrating: what reads
             the output in a branch that no batch takes is not seen. A mapping {"norm": ["q", "k", "v"]} says it
             instead, and only those are folded. False: every layer multiplies its input
    then     as in ChannelMethod: chooses the codes of the smoothed weight, octavo.GPTQ() for example
    With Int8Static the data is run twice.
    source   Xiao et al. 2023 (arXiv:2211.10438), eq. 4; docs/numerics.md, eq. 36 and 37
    """

    alpha: float | tuple[float, ...] = 0.5
    fold: Any = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", _alpha(self.alpha))
        object.__setattr__(self, "fold", _fold(self.fold))

    @property
    def alphas(self) -> tuple[float, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def keeps_sample(self) -> bool:  # type: ignore[override]
        return len(self.alphas) > 1  # to choose among them

    @classmethod
    @contextmanager
    def watching(
        cls, model: nn.Module, layers: Sequence[Any], *, in_place: bool, positions: Positions | None = None
    ) -> Iterator[None]:
        learning = [layer for layer in unsmoothed(layers) if layer.scheme.method.is_sequential]
        with smoothing(model, layers, in_place=in_place), inputs_recorded(model, learning, positions):
            yield


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
