# SPDX-License-Identifier: Apache-2.0
"""NF4 weights, quantiles of a normal distribution: four bits for weights, as QLoRA has them."""

from __future__ import annotations

from dataclasses import dataclass

from .. import formats
from ..formats import WeightFormat
from .base import CodebookScheme


@dataclass(frozen=True)
class NF4(CodebookScheme):
    """Weights of four bits that are quantiles of a normal distribution, as bitsandbytes and QLoRA have them.

    block_size, double_quant   as in octavo.formats.NF4
    activations   "int8": eight bits with scales that are found in every call. "int16": sixteen bits, nearly exact. Or
                  one of octavo.activations
    method        as in octavo.schemes.Scheme
    source        Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3; docs/numerics.md, eq. 80 to 82
    """

    block_size: int = 64
    double_quant: bool = True

    def format(self) -> WeightFormat:
        return formats.NF4(self.block_size, self.double_quant)
