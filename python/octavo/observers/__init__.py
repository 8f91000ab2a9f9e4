# SPDX-License-Identifier: Apache-2.0
"""Observers: what calibration remembers of activations, and how a range for their codes is chosen from it.

A config (a frozen dataclass of plain values) names the method; `config.make()` gives the module that watches one
tensor. Memory is O(bins), never O(data). What is static is calibrated per tensor (axis None) or per channel (axis);
per-token scales are found anew in every call and need no observer.
"""

from __future__ import annotations

from typing import Any

from .base import Observer, ObserverConfig
from .entropy import Entropy
from .histogram import Histogram
from .mse import MSE
from .percentile import Percentile
from .ranges import MinMax, MovingAverage

OBSERVERS: dict[str, type[ObserverConfig]] = {
    config.__name__: config for config in (MinMax, MovingAverage, Percentile, MSE, Histogram, Entropy)
}

__all__ = [
    "MSE",
    "OBSERVERS",
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
    options = dict(fields)
    name = options.pop("name", None)
    if name not in OBSERVERS:
        raise ValueError(
            f"observer {name!r} is unknown, this version of octavo has {', '.join(sorted(OBSERVERS))}"
        )
    try:
        return OBSERVERS[name](**options)
    except TypeError as error:
        raise ValueError(f"observer {name} cannot be made from {options}: {error}") from error
