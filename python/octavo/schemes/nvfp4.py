# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights: floats of four bits, a scale of eight bits for each 16 of them and one for all."""

from __future__ import annotations

from dataclasses import dataclass

from .. import formats
from ..formats import WeightFormat
from .base import CodebookScheme


@dataclass(frozen=True)
class NVFP4(CodebookScheme):
    """Weights of four bits, floats with a scale of eight bits for each 16 of them: octavo.formats.NVFP4.

    activations, method   as in octavo.NF4
    source        NVIDIA's NVFP4; docs/numerics.md, eq. 80, 83 and 84
    """

    def format(self) -> WeightFormat:
        return formats.NVFP4()
