# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, activations quantized to 8 bits row by row in every call: the fastest scheme."""

from __future__ import annotations

from dataclasses import dataclass

from ..activations import Activations, Dynamic
from ..base.configs import require_flags
from .base import Scheme


@dataclass(frozen=True)
class Int8Dynamic(Scheme):
    """Weights int8 per output channel; each row of the input gets a scale of its own at each call, no calibration.

    symmetric   True: activations are codes 1 .. 255 around 128. False: 0 .. 255 with a zero point for each row, which
                is finer for one-sided activations such as those after a ReLU
    weights, method   as in octavo.schemes.Scheme
    source      per-token activations: Yao et al. 2022, ZeroQuant (arXiv:2206.01861), section 4.1; affine codes:
                Jacob et al. 2018 (arXiv:1712.05877), section 2.3
    """

    symmetric: bool = True

    def __post_init__(self) -> None:
        require_flags(self, "symmetric")
        super().__post_init__()

    def read_input(self) -> Activations:
        return Dynamic(self.symmetric)
