# SPDX-License-Identifier: Apache-2.0
"""The schemes: one file each, found by listing this folder. A new file needs no other edit."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from .base import Scheme

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

SCHEMES: dict[str, type[Scheme]] = {scheme.__name__: scheme for scheme in Scheme.__subclasses__()}

__all__ = ["SCHEMES", "Scheme", "from_dict"]


def from_dict(fields: dict[str, Any]) -> Scheme:
    """The scheme that `Scheme.to_dict` wrote. Raises ValueError for a scheme or a field this version does not know."""
    options = dict(fields)
    name = options.pop("name", None)
    if name not in SCHEMES:
        raise ValueError(
            f"scheme {name!r} is unknown, this version of octavo has {', '.join(sorted(SCHEMES))}"
        )
    try:
        return SCHEMES[name](**options)
    except TypeError as error:
        raise ValueError(f"scheme {name} cannot be made from {options}: {error}") from error
