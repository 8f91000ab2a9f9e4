# SPDX-License-Identifier: Apache-2.0
"""MXFP4 weights: floats of four bits and a power of two for each 32 of them."""

from __future__ import annotations

from dataclasses import dataclass

from .. import formats
from ..formats import WeightFormat
from .base import CodebookScheme


@dataclass(frozen=True)
class MXFP4(CodebookScheme):
    """Weights of four bits, floats with a power of two for each 32 of them: octavo.formats.MXFP4.

    activations, method   as in octavo.NF4
    source        OCP Microscaling Formats 1.0; docs/numerics.md, eq. 80, 83 and 84
    """

    def format(self) -> WeightFormat:
        return formats.MXFP4()
