# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, activations quantized to 8 bits with one scale that calibration has found: no pass over the input."""

from __future__ import annotations

from dataclasses import dataclass

from .. import observers
from ..activations import Activations, Static
from ..base import configs
from ..observers import ObserverConfig
from .base import Scheme


@dataclass(frozen=True)
class Int8Static(Scheme):
    """Weights int8 per output channel; all of a layer's input has one scale, fixed by batches that calibrate it.

    observer    how the input's range is found: octavo.observers.MinMax(), Percentile(99.99), MSE(), ... or its class
    symmetric   True: the scale covers -t .. t, zero point 0. False: it covers low .. high with a zero point, which is
                finer for one-sided activations such as those after a ReLU
    int32_bias  True: the bias is rounded to multiples of input_scale * weight_scale and added to the integer sums, as
                ONNX and TFLite do. False: it stays a float
    weights, method   as in octavo.schemes.Scheme
    source      Jacob et al. 2018 (arXiv:1712.05877), section 2; observers: each names its own
    """

    observer: ObserverConfig = observers.MSE()
    symmetric: bool = True
    int32_bias: bool = False

    def __post_init__(self) -> None:
        configs.require_flags(self, "symmetric", "int32_bias")
        known = f"one of octavo.observers: {', '.join(configs.kinds(ObserverConfig))}"
        observer = configs.instance("Int8Static: observer", ObserverConfig, self.observer, known)
        object.__setattr__(self, "observer", observer)
        super().__post_init__()

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """MSE, affine codes, and the other ways to find a range that language models tell apart."""
        others = (observers.MinMax(), observers.Percentile(99.99), observers.Percentile(99.9))
        return [cls(), cls(symmetric=False), *map(cls, others)]

    def read_input(self) -> Activations:
        return Static(self.observer, self.symmetric, self.int32_bias)
