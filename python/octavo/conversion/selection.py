# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which scheme: name patterns, include, exclude, a filter function, or a dict of patterns.

A pattern is fnmatch ("encoder.*.fc?") or, after "re:", a regular expression; both must match the whole name. A pattern
that matches no layer is an error: a typo would otherwise quantize, or keep, the wrong layers without a word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..base import configs
from ..methods import Method
from ..schemes import Scheme, by_name

SchemeLike = Scheme | type[Scheme] | str
Patterns = str | Iterable[str] | None
LayerFilter = Callable[[nn.Module, str], bool]
Embeddings = bool | Patterns  # whether embeddings are quantized as well, or which


class Selection:
    """The user's choice, checked on construction.

    raises   TypeError for what is no scheme, pattern or function; ValueError for a malformed regular expression
    """

    def __init__(
        self,
        scheme: SchemeLike | Mapping[str, SchemeLike | None] | None,
        include: Patterns = None,
        exclude: Patterns = None,
        filter_fn: LayerFilter | None = None,
        include_embeddings: Embeddings = False,
    ):
        if filter_fn is not None and not callable(filter_fn):
            raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {filter_fn!r}")
        self.include = None if include is None else _pattern_list("include", include)
        self.exclude = _pattern_list("exclude", exclude or ())
        self.filter_fn = filter_fn
        is_pattern = not isinstance(include_embeddings, bool) and include_embeddings is not None
        wanted: Any = include_embeddings if is_pattern else "*" if include_embeddings else ()
        self.include_embeddings = _pattern_list("include_embeddings", wanted)
        self.names_embeddings = is_pattern
        if isinstance(scheme, Mapping):
            _pattern_list("scheme", scheme)
            self.schemes = {
                pattern: None if value is None else _scheme(value) for pattern, value in scheme.items()
            }
        else:
            self.schemes = {"*": _scheme(scheme)}
        self.is_mapping = isinstance(scheme, Mapping)

    def choose(self, module: nn.Module, names: Sequence[str]) -> tuple[Scheme | None, str]:
        """The scheme for a layer that goes by `names`, or None and the reason."""
        if self.include is not None and not any(_matches(pattern, names) for pattern in self.include):
            return None, "not matched by include"
        for pattern in self.exclude:
            if _matches(pattern, names):
                return None, f"excluded by {pattern!r}"
        if self.filter_fn is not None and not self.filter_fn(module, names[0]):
            return None, "refused by filter_fn"
        for pattern, scheme in self.schemes.items():
            if _matches(pattern, names):
                return scheme, "" if scheme else f"{pattern!r} keeps it float"
        return None, "no pattern matches"

    def choose_embedding(self, module: nn.Module, names: Sequence[str]) -> tuple[Scheme | None, str]:
        """The same for an embedding, which the user must have asked for."""
        if not self.include_embeddings:
            return None, "an embedding: include_embeddings=True quantizes it"
        if not any(_matches(pattern, names) for pattern in self.include_embeddings):
            return None, "not matched by include_embeddings"
        return self.choose(module, names)

    def check_patterns(self, names: Sequence[str], embeddings: Sequence[str] = ()) -> None:
        """Raises ValueError for a pattern that matches none of `names`, those of all layers, and if include_embeddings
        has one that matches none of `embeddings`."""
        patterns = {
            "include": self.include or [],
            "exclude": self.exclude,
            "scheme": self.schemes if self.is_mapping else [],
        }
        for argument, values in patterns.items():
            _check_patterns(argument, values, names, "layer")
        if self.names_embeddings:
            _check_patterns("include_embeddings", self.include_embeddings, embeddings, "embedding")


def _check_patterns(argument: str, patterns: Iterable[str], names: Sequence[str], kind: str) -> None:
    for pattern in patterns:
        if not _matches(pattern, names):
            raise ValueError(f"{argument}: pattern {pattern!r} matches no {kind}{_hint(pattern, names)}")


def _matches(pattern: str, names: Iterable[str]) -> bool:
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)


def _hint(pattern: str, names: Sequence[str]) -> str:
    if any(name.startswith(pattern + ".") for name in names):
        return f"; it is a module with layers inside, {pattern + '.*'!r} matches those"
    closest = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=1, cutoff=0.0)
    return f"; the closest name is {closest[0]!r}" if closest else "; the model has no layers with weights"


def _pattern_list(argument: str, patterns: str | Iterable[str]) -> list[str]:
    result = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in result:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{argument}: patterns are strings, got {pattern!r}; to choose by module use filter_fn"
            )
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
    return result


def _scheme(value: object) -> Scheme:
    if value is None:
        others = [name for name in configs.kinds(Scheme) if name != "Int8Dynamic"]
        raise TypeError(
            "scheme is missing. Give octavo.Int8Dynamic(), which is fast and needs no data, or another one: "
            f"{', '.join(others)}. A dict {{pattern: scheme}} chooses by layer"
        )
    if isinstance(value, type) and issubclass(value, Scheme):
        value = value()
    if isinstance(value, str):
        return by_name(value)
    if isinstance(value, Method) or isinstance(value, type) and issubclass(value, Method):
        name = value.name if isinstance(value, Method) else value.__name__
        raise TypeError(
            f"scheme is the method {name}, which goes with a scheme: octavo.Int8Dynamic(method=octavo.{name}())"
        )
    if not isinstance(value, Scheme):
        shown = f"a {type(value).__name__}" if isinstance(value, nn.Module | torch.Tensor) else repr(value)
        raise TypeError(
            f"scheme is {shown}, accepted are a scheme such as octavo.Int8Dynamic(), its class, its name such as "
            "'int8-dynamic', or a dict {pattern: scheme or None}"
        )
    return value
