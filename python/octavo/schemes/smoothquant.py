# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outliers of the input are moved into the weight, where they do less harm, before both are quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..nn import (
    PreparedLinear,
    PreparedSmoothed,
    QuantLinear,
    SmoothedLinear,
    StaticQuantLinear,
    StaticSmoothedLinear,
)
from ..observers import Observer
from ..qparams import QParams
from .base import Scheme, from_dict

Fold = bool | tuple[tuple[str, tuple[str, ...]], ...]
LAYERS: dict[type[QuantLinear], type[SmoothedLinear]] = {
    QuantLinear: SmoothedLinear,
    StaticQuantLinear: StaticSmoothedLinear,
}


@dataclass(frozen=True)
class SmoothQuant(Scheme):
    """Each input channel is divided by an s, its weights are multiplied by it; then both are quantized as `then` says.

    alpha    in [0, 1]: how much of a channel's range goes into the weights. Several, such as (0.3, 0.5, 0.7): for each
             layer the one whose output is closest, on some rows of the data, is taken
    then     the scheme that follows, Int8Dynamic() if not given; also Int8WeightOnly, Int8Static. The data is then run
             twice for Int8Static
    fold     True: a layer before that can absorb 1 / s does, a norm or a linear layer, if everything that reads its
             output is smoothed alike; it costs nothing then, and the layer becomes one of `then`. Which layers do is
             found while calibrating. A mapping {"norm": ["q", "k", "v"]} says it instead, and only those are folded.
             False: every layer multiplies its input
    weight_bits   those of `then`, if not given
    source   Xiao et al. 2023 (arXiv:2211.10438), eq. 4; docs/numerics.md, eq. 36 and 37
    """

    weight_bits: int = field(default=0, kw_only=True)
    alpha: float | tuple[float, ...] = 0.5
    then: Any = None
    fold: Any = True

    needs_data: ClassVar[bool] = True

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """Before rows with a scale each, and before one scale for all, found by min-max as in the paper."""
        static = {"name": "Int8Static", "observer": {"name": "MinMax"}}
        return [cls(), cls(then=from_dict(static))]

    def __post_init__(self) -> None:
        then = _then(self.then)
        if self.weight_bits != 0:
            then = replace(then, weight_bits=self.weight_bits)
        object.__setattr__(self, "then", then)
        object.__setattr__(self, "weight_bits", then.weight_bits)
        object.__setattr__(self, "alpha", _alpha(self.alpha))
        object.__setattr__(self, "fold", _fold(self.fold))
        super().__post_init__()

    @property
    def layer(self) -> type[QuantLinear]:  # type: ignore[override]
        return LAYERS[self.then.layer]

    @property
    def symmetric(self) -> bool:
        """Of the activations' codes, as `then` has them."""
        return getattr(self.then, "symmetric", True)

    @property
    def has_zero_point(self) -> bool:
        return self.then.has_zero_point

    @property
    def int32_bias(self) -> bool:
        return getattr(self.then, "int32_bias", False)

    @property
    def calibration_passes(self) -> int:  # type: ignore[override]
        return 2 if self.then.needs_data else 1

    @property
    def alphas(self) -> tuple[float, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def keeps_sample(self) -> bool:
        """Whether rows of the input are needed, to choose among several alphas."""
        return len(self.alphas) > 1

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        return self.then.linear(x, packed, column_sum, weight_scale, bias, activation)

    def prepare_linear(
        self, linear: nn.Linear, *, estimator: str = "clipped", learn_scales: bool = False
    ) -> PreparedLinear:
        options: dict[str, Any] = {"estimator": estimator, "learn_scales": learn_scales}
        observer = self.then.prepare_linear(linear, **options).input_observer
        return PreparedSmoothed(linear, self, observer=observer, **options)

    def freeze(self, prepared: Any) -> QuantLinear:
        """A layer of `then` if what comes before gives smoothed inputs, else one that smooths them itself."""
        prepared.require_calibrated()
        if prepared.is_folded:
            return self.then.freeze(prepared)
        layer: Any = super().freeze(prepared)
        if isinstance(layer, StaticQuantLinear):
            layer.set_input_qparams_(prepared.input_qparams)
        layer.set_input_multiplier_(prepared.input_multiplier)
        return layer

    def weight_qparams(self, weight: torch.Tensor) -> QParams:
        return self.then.weight_qparams(weight)

    def input_qparams(self, observer: Observer) -> QParams:
        return self.then.input_qparams(observer)

    def fake_quantize_input(self, x: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        return self.then.fake_quantize_input(x, layer)

    def fake_quantize_bias(self, bias: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        return self.then.fake_quantize_bias(bias, layer)


def _then(value: Any) -> Scheme:
    """`value` itself, the default of its class, what its to_dict gave, or, for None, Int8Dynamic()."""
    if value is None:
        value = {"name": "Int8Dynamic"}
    if isinstance(value, Mapping):
        value = from_dict(dict(value))
    if isinstance(value, type) and issubclass(value, Scheme):
        value = value()
    if not isinstance(value, Scheme) or value.layer not in LAYERS:
        raise TypeError(
            f"SmoothQuant: then is {value!r}, accepted are Int8Dynamic, Int8WeightOnly and Int8Static, "
            "instances or classes"
        )
    return value


def _alpha(value: Any) -> float | tuple[float, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    alphas = tuple(value) if several else (value,)
    if not alphas or not all(isinstance(a, int | float) and 0 <= a <= 1 for a in alphas):
        raise ValueError(f"SmoothQuant: alpha must be a number in [0, 1] or several of them, got {value!r}")
    return tuple(map(float, alphas)) if several else float(value)


def _fold(value: Any) -> Fold:
    """A mapping as sorted pairs, so that schemes can be compared and hashed; JSON has lists for tuples."""
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
