# SPDX-License-Identifier: Apache-2.0
"""The schemes: one file each, found by listing this folder. A new file needs no other edit."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Scheme, from_dict, label

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

SCHEMES: dict[str, type[Scheme]] = {scheme.__name__: scheme for scheme in Scheme.__subclasses__()}

__all__ = ["SCHEMES", "Scheme", "from_dict", "label"]
