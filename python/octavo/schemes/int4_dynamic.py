# SPDX-License-Identifier: Apache-2.0
"""Weights of few bits in groups, activations quantized to 8 bits in groups in every call: small and fast."""

from __future__ import annotations

from dataclasses import dataclass

from ..activations import Activations, Dynamic
from .base import GroupScheme, input_group_size


@dataclass(frozen=True)
class Int4Dynamic(GroupScheme):
    """Weights of 4 bits, or of `bits`; so many neighbours of a row of the input as of the weight share a scale.

    group_size, bits, symmetric, scale_dtype   as in octavo.formats.IntGroup. Groups of the input have at least 32
                 elements; with None a scale is that of a whole row, in weights and input
    method       as in octavo.schemes.Scheme
    raises       TypeError, ValueError as octavo.formats.IntGroup
    source       groups on both sides: ggml's Q4_0 times Q8_0; the codes: docs/numerics.md
    """

    def read_input(self) -> Activations:
        return Dynamic(group_size=input_group_size(self.group_size))
