# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, activations quantized to 8 bits with one scale that calibration has found: no pass over the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .. import observers
from ..fake_quantize import fake_quantize, fake_quantize_bias, lsq
from ..nn import PreparedLinear, QuantLinear, StaticQuantLinear
from ..observers import Observer, ObserverConfig
from ..qparams import QParams
from .base import Scheme


@dataclass(frozen=True)
class Int8Static(Scheme):
    """Weights int8 per output channel; all of a layer's input has one scale, fixed by batches that calibrate it.

    observer    how the input's range is found: octavo.observers.MinMax(), Percentile(99.99), MSE(), ... or its class
    symmetric   True: the scale covers -t .. t, zero point 0. False: it covers low .. high with a zero point, which is
                finer for one-sided activations such as those after a ReLU
    int32_bias  True: the bias is rounded to multiples of input_scale * weight_scale and added to the integer sums, as
                ONNX and TFLite do. False: it stays a float
    source      Jacob et al. 2018 (arXiv:1712.05877), section 2; observers: each names its own
    """

    observer: ObserverConfig = observers.MSE()
    symmetric: bool = True
    int32_bias: bool = False

    layer: ClassVar[type[QuantLinear]] = StaticQuantLinear
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("symmetric", "int32_bias"):
            value = getattr(self, flag)
            if not isinstance(value, bool):
                raise TypeError(f"Int8Static: {flag} must be True or False, got {value!r}")
        object.__setattr__(self, "observer", _config(self.observer))

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """MSE, affine codes, and the other ways to find a range that language models tell apart."""
        others = (observers.MinMax(), observers.Percentile(99.99), observers.Percentile(99.9))
        return [cls(), cls(symmetric=False), *map(cls, others)]

    @property
    def has_zero_point(self) -> bool:
        return not self.symmetric

    def prepare_linear(
        self, linear: nn.Linear, *, estimator: str = "clipped", learn_scales: bool = False
    ) -> PreparedLinear:
        return PreparedLinear(
            linear, self, observer=self.observer.make(), estimator=estimator, learn_scales=learn_scales
        )

    def freeze(self, prepared: PreparedLinear) -> QuantLinear:
        qparams = prepared.input_qparams
        layer: Any = super().freeze(prepared)
        layer.set_input_qparams_(qparams)
        return layer

    def input_qparams(self, observer: Observer) -> QParams:
        # Symmetric codes reach -128 as well, but the scale is that of 127 steps, so that -t and t get mirrored codes.
        return observer.qparams(self.symmetric, -127 if self.symmetric else -128, 127)

    def fake_quantize_input(self, x: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        q = layer.input_qparams
        if layer.learn_scales:
            # The paper's factor for activations: features are counted, rows are not.
            factor = 1 / math.sqrt(layer.in_features * q.qmax)
            y = lsq(x, layer.input_scale, q.qmin, q.qmax, offset=layer.input_offset, grad_factor=factor)
        else:
            y = fake_quantize(x, q.scale, q.zero_point, q.qmin, q.qmax, estimator=layer.estimator)
        return y + (x - x).detach()  # NaN where x is not finite: the integer layer gives such rows as NaN

    def fake_quantize_bias(self, bias: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        if not self.int32_bias:
            return bias
        scales = layer.input_qparams.scale, layer.weight_qparams.scale
        try:
            return fake_quantize_bias(bias, *scales, layer.in_features)
        except ValueError as error:
            raise ValueError(f"layer {layer.name!r}: {error}") from error

    def compressed_tensors_activations(self) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "int",
            "strategy": "tensor",
            "symmetric": self.symmetric,
            "dynamic": False,
        }


def _config(observer: Any) -> ObserverConfig:
    """`observer` itself, the default of its class, or what its to_dict gave."""
    if isinstance(observer, Mapping):
        return observers.from_dict(dict(observer))
    if isinstance(observer, type) and issubclass(observer, ObserverConfig):
        observer = observer()
    if not isinstance(observer, ObserverConfig):
        raise TypeError(
            f"Int8Static: observer is {observer!r}, accepted is one of octavo.observers: "
            f"{', '.join(sorted(observers.OBSERVERS))}"
        )
    return observer
