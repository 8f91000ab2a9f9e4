# SPDX-License-Identifier: Apache-2.0
"""Observers: what calibration remembers of activations, and how a range for their codes is chosen from it.

A config (a frozen dataclass of plain values) names the method; `config.make()` gives the module that watches one
tensor. Memory is O(bins), never O(data). What is static is calibrated per tensor (axis None) or per channel (axis);
per-token scales are found anew in every call and need no observer.
"""

from __future__ import annotations

from typing import Any

from ..base import configs
from .base import Observer, ObserverConfig
from .entropy import Entropy
from .histogram import Histogram
from .mse import MSE
from .percentile import Percentile
from .ranges import MinMax, MovingAverage

__all__ = [
    "MSE",
    "Entropy",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Observer",
    "ObserverConfig",
    "Percentile",
    "from_dict",
]


def from_dict(fields: dict[str, Any]) -> ObserverConfig:
    """The config that `ObserverConfig.to_dict` wrote. Raises ValueError for a name or a field not known here."""
    return configs.from_dict("observer", ObserverConfig, fields)
