# SPDX-License-Identifier: Apache-2.0
"""Int8 weights, nearly exact activations: as small as Int8Dynamic, closer to the float model, slower at large batch."""

from __future__ import annotations

from dataclasses import dataclass

from ..activations import Activations, SixteenBits
from .base import Scheme


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """Weights int8 per output channel; each row of the input is rounded to 16 bits, finer than bfloat16.

    weights, method   as in octavo.schemes.Scheme
    source   weight rounding: Jacob et al. 2018 (arXiv:1712.05877); the two 8-bit planes of the input: ours
    """

    def read_input(self) -> Activations:
        return SixteenBits()
