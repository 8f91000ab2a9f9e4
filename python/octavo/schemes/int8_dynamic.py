# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, activations quantized to 8 bits in every call, row by row or in groups: the fastest scheme."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..activations import Activations, Dynamic
from ..base import configs
from ..base.configs import require_flags
from ..formats import Int8, IntGroup, WeightFormat
from .base import Scheme, input_group_size, with_bits


@dataclass(frozen=True)
class Int8Dynamic(Scheme):
    """Weights int8 per output channel; each row of the input gets a scale of its own at each call, no calibration.

    symmetric    True: activations are codes 1 .. 255 around 128. False: 0 .. 255 with a zero point for each row, which
                 is finer for one-sided activations such as those after a ReLU
    group_size   a multiple of 16: so many neighbours in a row share a scale, in weights and activations, which costs a
                 language model a tenth of the error that a scale for each row does. The weights then are
                 octavo.formats.IntGroup(8, group_size)
    activation_group_size   a multiple of 32: the same for activations alone. None: `group_size`, at least 32
    bits         of the weights: 8, or 7, which is faster on AVX2 and only there, no smaller, and 6 dB less accurate
    weights, method   as in octavo.schemes.Scheme
    raises       TypeError, ValueError for other group sizes, and for two that contradict each other
    source       per-token activations: Yao et al. 2022, ZeroQuant (arXiv:2206.01861), section 4.1; affine codes:
                 Jacob et al. 2018 (arXiv:1712.05877), section 2.3; groups on both sides: ggml's Q8_0 times Q8_0
    """

    symmetric: bool = True
    group_size: int | None = None
    activation_group_size: int | None = None
    bits: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        require_flags(self, "symmetric")
        configs.require_group_size("Int8Dynamic: group_size", self.group_size, 16)
        configs.require_group_size("Int8Dynamic: activation_group_size", self.activation_group_size, 32)
        if self.group_size is not None and self.weights == Int8():
            object.__setattr__(self, "weights", IntGroup(8, self.group_size))
        if not self.symmetric and (self.group_size or self.activation_group_size):
            raise ValueError("Int8Dynamic: groups of activations have symmetric codes; use symmetric=True")
        super().__post_init__()
        if self.group_size is not None and getattr(self.weights, "group_size", None) != self.group_size:
            raise ValueError(
                f"Int8Dynamic: group_size is {self.group_size} and the weights are {configs.label(self.weights)}; "
                "give one of the two, and activation_group_size for the activations"
            )

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """Rows and groups."""
        return [cls(), cls(symmetric=False), cls(activation_group_size=32), cls(group_size=32)]

    def read_weights(self, weights: WeightFormat) -> WeightFormat:
        return with_bits(self, weights, self.bits)

    def read_input(self) -> Activations:
        return Dynamic(self.symmetric, self.activation_group_size or input_group_size(self.group_size))
