# SPDX-License-Identifier: Apache-2.0
"""The weight formats: one file for each family, found by listing this folder. A new file needs no other edit."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Kernel, WeightFormat, differs

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .bitsandbytes import FP4, NF4  # noqa: E402  the names that users write
from .float4 import MXFP4, NVFP4  # noqa: E402
from .ggml import BLOCK_TYPES, GGML, fallback_type  # noqa: E402
from .half import Half  # noqa: E402
from .int8 import CoarseInt8, Int8  # noqa: E402
from .int_group import IntGroup  # noqa: E402

__all__ = [
    "BLOCK_TYPES",
    "FP4",
    "GGML",
    "MXFP4",
    "NF4",
    "NVFP4",
    "CoarseInt8",
    "Half",
    "Int8",
    "IntGroup",
    "Kernel",
    "WeightFormat",
    "differs",
    "fallback_type",
]
