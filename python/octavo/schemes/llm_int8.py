# SPDX-License-Identifier: Apache-2.0
"""LLM.int8(): the few input columns that hold outliers are multiplied in 16 bits, all others in 8."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..activations import Activations, OutlierColumns
from ..base.configs import require_flags
from .base import Scheme


@dataclass(frozen=True)
class LLMInt8(Scheme):
    """As Int8Dynamic, without the columns of x in which calibration has seen an |x| of `threshold` or more.

    Those stay floats in the weight and are multiplied in 16 bits; the scale of a row is found without them.
    threshold   >= 0, in the units of x. 6.0 suits inputs that a norm has brought to unit variance; 0.0 makes every
                column that is not all zero an outlier
    relative    True: threshold counts in medians of the columns' largest |x|, for inputs of any size
    weights, method   as in octavo.schemes.Scheme
    source      Dettmers et al. 2022 (arXiv:2208.07339), section 3.2, where the columns are found anew in every call;
                here they are fixed, so that a row does not depend on the rows beside it
    """

    threshold: float = 6.0
    relative: bool = False

    def __post_init__(self) -> None:
        require_flags(self, "relative")
        if not isinstance(self.threshold, int | float) or isinstance(self.threshold, bool):
            raise TypeError(f"LLMInt8: threshold must be a number, got {self.threshold!r}")
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"LLMInt8: threshold must be finite and not negative, got {self.threshold}")
        object.__setattr__(self, "threshold", float(self.threshold))
        super().__post_init__()

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """The paper's threshold, which no column of the study's small model reaches, and one that some do."""
        return [cls(), cls(4.0)]

    def read_input(self) -> Activations:
        return OutlierColumns(self.threshold, self.relative)
