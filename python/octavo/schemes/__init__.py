# SPDX-License-Identifier: Apache-2.0
"""The schemes: one file each, found by listing this folder. A new file needs no other edit."""

from __future__ import annotations

import importlib
import pkgutil

from ..base import configs
from ..base.configs import label
from .base import Scheme, by_name, from_dict

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

SCHEMES: dict[str, type[Scheme]] = configs.kinds(Scheme)

__all__ = ["SCHEMES", "Scheme", "by_name", "from_dict", "label"]
