# SPDX-License-Identifier: Apache-2.0
"""Choices that users make, as frozen dataclasses of plain values: they compare, print, and go to files and back.

Schemes, weight formats, activations, methods and observers are of this kind. Each kind has a base class, and a class
derived from it is found by its name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, TypeVar

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """Instances compare by value and can be dictionary keys. Fields hold plain values or other configs."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """{"name": class name, field: value, ...}, JSON; `from_dict` of the kind reads it back."""
        return {"name": self.name, **{item.name: _plain(getattr(self, item.name)) for item in _given(self)}}


def kinds(base: type[C]) -> dict[str, type[C]]:
    """Every class derived from `base`, at any depth, that can be instantiated, by name and in alphabetical order."""
    found: dict[str, type[C]] = {}
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            found[kind.__name__] = kind
        found |= kinds(kind)
    return dict(sorted(found.items()))


def spelled(name: str) -> str:
    """The form in which names are compared: it is the same for "Int8Dynamic", "int8-dynamic" and "int8_dynamic"."""
    return name.replace("-", "").replace("_", "").lower()


def short_name(kind: type[Config]) -> str:
    """How the command line writes the name of a class: "int8-weight-only" for Int8WeightOnly."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", kind.__name__)
    return words.lower()


def from_dict(what: str, base: type[C], fields: Mapping[str, Any]) -> C:
    """The config that `to_dict` wrote.

    what     the kind's name, for errors
    raises   ValueError for a name or a field that this version does not know
    """
    options = dict(fields)
    kind = named(what, base, options.pop("name", None))
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{what} {kind.__name__} cannot be made from {options}: {error}") from error


def named(what: str, base: type[C], name: Any) -> type[C]:
    """The class derived from `base` that goes by `name`, in any spelling. Raises ValueError if there is none."""
    known = kinds(base)
    found = [kind for key, kind in known.items() if isinstance(name, str) and spelled(key) == spelled(name)]
    if not found:
        raise ValueError(f"{what} {name!r} is unknown, this version of octavo has {', '.join(known)}")
    return found[0]


def instance(what: str, base: type[C], value: Any, examples: str) -> C:
    """`value` as an instance of `base`: itself, its class's default, or what its to_dict gave.

    raises   TypeError for anything else, which names `what` and `examples`
    """
    if isinstance(value, Mapping):
        return from_dict(what, base, value)
    if isinstance(value, type) and issubclass(value, base):
        value = value()
    if not isinstance(value, base):
        raise TypeError(f"{what} is {value!r}, accepted are {examples}")
    return value


def label(config: Config) -> str:
    """The name and the fields that differ from their defaults: "Int8Dynamic(symmetric=False)", "Int8Static(MinMax)".

    The first field is shown without its name, as one writes it, unless it is a flag.
    """
    own = sorted(_given(config), key=lambda item: bool(item.kw_only))
    needed = {item.name: getattr(config, item.name) for item in own}
    for item in reversed(
        own
    ):  # what follows from other fields, such as weights from a group_size, goes first
        rest = {name: value for name, value in needed.items() if name != item.name}
        if item.default is not MISSING and _is_made_from(config, rest):
            needed = rest
    changed = []
    for item in own:
        if item.name in needed:
            value = needed[item.name]
            text = label(value) if isinstance(value, Config) else repr(value)
            is_bare = item is own[0] and not item.kw_only and not isinstance(value, bool)
            changed.append(text if is_bare else f"{item.name}={text}")
    return f"{config.name}({', '.join(changed)})" if changed else config.name


def _is_made_from(config: Config, values: Mapping[str, Any]) -> bool:
    try:
        return type(config)(**values) == config
    except (TypeError, ValueError):  # without the value that is left out the others contradict each other
        return False


def require_flags(config: Config, *names: str) -> None:
    """Raises TypeError for a field of `names` that is neither True nor False."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise TypeError(f"{config.name}: {name} must be True or False, got {value!r}")


def require_int(what: str, value: Any) -> None:
    """Raises TypeError for anything but an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, got {value!r}")


def require_group_size(what: str, value: Any, multiple: int) -> None:
    """Raises TypeError, ValueError unless `value` is None or a positive multiple of `multiple`."""
    if value is None:
        return
    require_int(what, value)
    if value < 1 or value % multiple:
        raise ValueError(f"{what} must be a multiple of {multiple}, got {value}; None is the whole row")


def _given(config: Config) -> list[Field]:
    return [item for item in fields(config) if item.init]


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Config) else value
