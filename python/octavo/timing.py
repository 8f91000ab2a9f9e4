# SPDX-License-Identifier: Apache-2.0
"""Honest timing on a noisy machine: all candidates take turns in one process, and the spread is kept.

Absolute times move with the neighbours of a virtual machine; ratios within one run hold.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

from .cpu import cpu_info


@dataclass(frozen=True)
class Times:
    """Seconds per call: the best of all rounds, the median, and the range that 8 of 10 rounds stayed within."""

    best: float
    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        tenths = quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
        return cls(min(samples), median(samples), tenths[0], tenths[-1])


def interleaved(
    candidates: dict[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 0.02
) -> dict[str, Times]:
    """Times every candidate in turn, `rounds` times, each turn at least `seconds` long (one call at the least)."""
    calls = {}
    for name, run in candidates.items():
        run()  # caches, lazy packing, page faults
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name])
    return {name: Times.of(times) for name, times in samples.items()}


def page_faults(run: Callable[[], object], calls: int = 5) -> float:
    """Page faults of one call: what malloc gives back to the kernel after one call, the next must fetch again."""
    run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def machine() -> dict[str, object]:
    """What a reader must know to judge a time: CPU, instruction sets, threads, versions, malloc."""
    info = cpu_info()
    return {
        "cpu": cpu_name(),
        "isas": list(info.isas),
        "active_isa": info.active,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
    }


def cpu_name() -> str:
    """Model, family and microarchitecture-telling numbers, because virtual machines often hide the model's name."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.processor() or platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family} model {model})" if family else name
