# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them: 8000, "8 kB", "1.5 MB", "2 MiB"."""

from __future__ import annotations

import re
from numbers import Real
from typing import Any

PREFIXES = "kmgt"
SIZE = re.compile(
    r"\s*([+]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?:([kmgt])(i?))?(?:b|bytes?)?\s*", re.IGNORECASE
)


def bytes_of(size: Any, argument: str) -> float:
    """`size` in bytes: a number, or a text with a number and perhaps a unit.

    size      k, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024; "B" may follow; upper and lower case are one
    argument  what errors call it
    Raises: TypeError for what is no number and no text; ValueError for a text that is no size.
    """
    if isinstance(size, Real) and not isinstance(size, bool):
        return size  # type: ignore[return-value]
    if not isinstance(size, str):
        raise TypeError(f'{argument} is {size!r}; a number of bytes or a text such as "8 kB" is needed')
    found = SIZE.fullmatch(size)
    if found is None or re.search(r",(?!\d{3}(?!\d))", found[1]):
        raise ValueError(
            f'{argument} is {size!r}; accepted are a number of bytes and texts such as "8 kB", "2 MiB"'
        )
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    value = float(number.replace(",", "").replace("_", ""))
    value *= base ** (PREFIXES.index(prefix.lower()) + 1 if prefix else 0)
    return int(value) if value.is_integer() else value
