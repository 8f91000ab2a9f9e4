# SPDX-License-Identifier: Apache-2.0
"""How far an approximation is from its reference, in numbers: tensors, distributions, vectors, decisions.

Each file holds one kind of figure. An accumulator takes batches and keeps a few numbers per token or vector at most,
never the logits; the figures of many batches are the figures of all batches put together. Formulas: docs/numerics.md.
"""

from .distribution import Distribution, DistributionAccumulator, kld
from .error import CHUNK, ErrorAccumulator, cosine, max_abs_error, relative_error, sqnr_db
from .forced import Forced, ForcedAccumulator
from .paired import mcnemar
from .vectors import Vectors, VectorsAccumulator

__all__ = [
    "CHUNK",
    "Distribution",
    "DistributionAccumulator",
    "ErrorAccumulator",
    "Forced",
    "ForcedAccumulator",
    "Vectors",
    "VectorsAccumulator",
    "cosine",
    "kld",
    "max_abs_error",
    "mcnemar",
    "relative_error",
    "sqnr_db",
]
