# SPDX-License-Identifier: Apache-2.0
"""Patterns of layer names: fnmatch ("encoder.*.fc?") or, after "re:", a regular expression. Both match whole names.

A pattern that matches no layer is an error: a typo would otherwise choose, or leave out, other layers without a word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

Patterns = str | Iterable[str] | None


def pattern_list(argument: str, patterns: str | Iterable[str], remedy: str = "") -> list[str]:
    """`patterns` as a list.

    argument   what errors call them
    remedy     what to do instead of giving something else than patterns
    raises     TypeError for what is no string; ValueError for a malformed regular expression
    """
    result = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in result:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: patterns are strings, got {pattern!r}{remedy}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
    return result


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether `pattern` matches one of `names`."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)


def require_match(argument: str, pattern: str, names: Sequence[str], kind: str = "layer") -> None:
    """Raises ValueError, with the closest name, if `pattern` matches none of `names`, which are those of a `kind`."""
    if not matches(pattern, names):
        raise ValueError(f"{argument}: pattern {pattern!r} matches no {kind}{_hint(pattern, names)}")


def _hint(pattern: str, names: Sequence[str]) -> str:
    if any(name.startswith(pattern + ".") for name in names):
        return f"; it is a module with layers inside, {pattern + '.*'!r} matches those"
    closest = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=1, cutoff=0.0)
    return f"; the closest name is {closest[0]!r}" if closest else "; the model has no layers with weights"
