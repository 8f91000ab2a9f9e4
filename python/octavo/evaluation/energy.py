# SPDX-License-Identifier: Apache-2.0
"""Energy of a call, read from the CPU's own counters (RAPL, in Linux' powercap folder), or an error: why not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
SECONDS = 0.5  # measured at least: counters move about once a millisecond


class Rapl:
    """The energy counters of all CPU packages. They count everything that runs on the machine.

    Raises: OSError if the machine has none, or they may not be read.
    Source: Linux, Documentation/power/powercap/powercap.rst.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:0 is a part of one and already in its count
        self._packages = sorted(zone for zone in folder.glob("intel-rapl:*") if zone.name.count(":") == 1)
        if not self._packages:
            raise OSError("this machine exposes no RAPL energy counters (virtual machines rarely do)")
        self._ranges = [_read(zone / "max_energy_range_uj") for zone in self._packages]
        self._last = self._counters()

    def joules(self) -> float:
        """The joules since the last call, or since this object was made. A counter may wrap around once in between."""
        before, self._last = self._last, self._counters()
        spent = 0
        for start, end, limit in zip(before, self._last, self._ranges, strict=True):
            spent += end - start if end >= start else end - start + limit
        return spent / 1e6

    def _counters(self) -> list[int]:
        return [_read(zone / "energy_uj") for zone in self._packages]


def joules_per_call(run: Callable[[], object], folder: Path = POWERCAP) -> float:
    """Mean joules of one call, all CPU packages together, idle share and other processes included.

    Raises: OSError if there are no counters or they may not be read (on most systems only root may).
    """
    counter = Rapl(folder)
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < SECONDS:
        run()
        calls += 1
    return counter.joules() / calls


def _read(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise OSError(f"{path} may not be read by this user") from error
