# SPDX-License-Identifier: Apache-2.0
"""The ways to read a layer's input, one file each, found by listing this folder. A new file needs no other edit."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Activations

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .dynamic import Dynamic  # noqa: E402
from .floats import Floats  # noqa: E402
from .outliers import OutlierColumns  # noqa: E402
from .sixteen_bits import SixteenBits  # noqa: E402
from .static import Static  # noqa: E402

__all__ = ["Activations", "Dynamic", "Floats", "OutlierColumns", "SixteenBits", "Static"]
