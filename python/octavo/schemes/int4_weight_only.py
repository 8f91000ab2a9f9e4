# SPDX-License-Identifier: Apache-2.0
"""Weights of few bits in groups, nearly exact activations: as small as Int4Dynamic, closer to the float model."""

from __future__ import annotations

from dataclasses import dataclass

from ..activations import Activations, SixteenBits
from .base import GroupScheme, Scheme


@dataclass(frozen=True)
class Int4WeightOnly(GroupScheme):
    """Weights of 4 bits, or of `bits`; each row of the input is rounded to 16 bits, finer than bfloat16.

    group_size, bits, symmetric, scale_dtype   as in octavo.formats.IntGroup
    method       as in octavo.schemes.Scheme
    raises       TypeError, ValueError as octavo.formats.IntGroup
    source       "W4A16", as Frantar et al. 2022 (arXiv:2210.17323) and Lin et al. 2023 (arXiv:2306.00978) use it
    """

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """Groups of two sizes, and fewer bits."""
        return [cls(), *(cls(64, bits, symmetric=False) for bits in (4, 3, 2))]

    def read_input(self) -> Activations:
        return SixteenBits()
