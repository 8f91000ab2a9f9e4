# SPDX-License-Identifier: Apache-2.0
"""Is one model really better than the other on the same questions, or is it chance?"""

from __future__ import annotations

import math


def mcnemar(only_reference: int, only_model: int) -> float:
    """Two-sided p-value that two models which differ on some questions are equally good.

    only_reference, only_model   questions that only one of the two got right. Those that both got right, or both
                                 wrong, say nothing about the difference.
    The binomial distribution itself is summed, not its normal approximation. 1.0 if nothing differs.

    Raises: TypeError if a count is not an int; ValueError if one is negative.
    Source: McNemar 1947, in the exact form of Edwards 1948; docs/numerics.md, eq. 26.
    """
    for name, count in (("only_reference", only_reference), ("only_model", only_model)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"mcnemar: {name} is {type(count).__name__}, an int is needed")
        if count < 0:
            raise ValueError(f"mcnemar: {name} is {count}, a count cannot be negative")
    n, smaller = only_reference + only_model, min(only_reference, only_model)
    if 2 * smaller == n:
        return 1.0
    # Relative to the largest term, each smaller one follows by a ratio: nothing overflows, all terms are positive.
    log_largest = math.lgamma(n + 1) - math.lgamma(smaller + 1) - math.lgamma(n - smaller + 1)
    term = total = 1.0
    for i in range(smaller, 0, -1):
        term *= i / (n - i + 1)
        total += term
    return min(1.0, 2.0 * total * math.exp(log_largest - n * math.log(2.0)))
