# SPDX-License-Identifier: Apache-2.0
"""FP4 weights: bitsandbytes' float of four bits, which NF4 is better than."""

from __future__ import annotations

from dataclasses import dataclass

from .. import formats
from ..formats import WeightFormat
from .base import CodebookScheme


@dataclass(frozen=True)
class FP4(CodebookScheme):
    """Weights of four bits, bitsandbytes' float of that size. NF4 takes the same room and has smaller errors.

    block_size, double_quant   as in octavo.formats.FP4
    activations, method   as in octavo.NF4
    source        bitsandbytes 0.50; docs/numerics.md, eq. 80 to 82
    """

    block_size: int = 64
    double_quant: bool = True

    def format(self) -> WeightFormat:
        return formats.FP4(self.block_size, self.double_quant)
