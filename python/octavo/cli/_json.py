# SPDX-License-Identifier: Apache-2.0
"""Strict JSON for programs, which has no Inf and NaN: they become the strings that `float` reads."""

from __future__ import annotations

import json
import math
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(strict(value), indent=2, allow_nan=False))


def strict(value: Any) -> Any:
    """`value` with strings in the places of Inf and NaN, at any depth."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
