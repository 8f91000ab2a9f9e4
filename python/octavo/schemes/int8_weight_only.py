# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, nearly exact activations: as small as Int8Dynamic, closer to the float model, slower at large batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..activations import Activations, SixteenBits
from ..formats import WeightFormat
from .base import Scheme, with_bits


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """Weights int8 per output channel; each row of the input is rounded to 16 bits, finer than bfloat16.

    bits     of the weights: 8, or 7: no smaller, and 6 dB less accurate; no faster either, unlike with Int8Dynamic
    weights, method   as in octavo.schemes.Scheme
    source   weight rounding: Jacob et al. 2018 (arXiv:1712.05877); the two 8-bit planes of the input: ours
    """

    bits: int = field(default=8, kw_only=True)

    def read_weights(self, weights: WeightFormat) -> WeightFormat:
        return with_bits(self, weights, self.bits)

    def read_input(self) -> Activations:
        return SixteenBits()
