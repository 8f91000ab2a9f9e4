# SPDX-License-Identifier: Apache-2.0
"""The methods: which codes are chosen for a weight. One file each, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Method, RoundToNearest

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .clip_search import ClipSearch, default_method  # noqa: E402
from .gptq import GPTQ  # noqa: E402
from .hqq import HQQ  # noqa: E402
from .smoothquant import SmoothQuant  # noqa: E402

__all__ = ["GPTQ", "HQQ", "ClipSearch", "Method", "RoundToNearest", "SmoothQuant", "default_method"]
