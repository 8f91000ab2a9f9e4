# SPDX-License-Identifier: Apache-2.0
"""Honest timing on a noisy machine: all candidates take turns in one process, and both best and median are kept.

Absolute times move with the neighbours of a virtual machine; ratios within one run hold.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import octavo


@dataclass(frozen=True)
class Times:
    """Seconds per call."""

    best: float
    median: float


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
    return {name: Times(min(times), statistics.median(times)) for name, times in samples.items()}


def figures(times: dict[str, Times], name: str) -> dict[str, float]:
    """Milliseconds of one candidate, and how many times as fast it is as the two that every benchmark has."""
    taken = times[name]
    return {
        "best_ms": taken.best * 1e3,
        "median_ms": taken.median * 1e3,
        "speedup_over_quantize_dynamic": times["quantize_dynamic"].median / taken.median,
        "speedup_over_fp32": times["torch fp32"].median / taken.median,
    }


def page_faults(run: Callable[[], object], calls: int = 5) -> float:
    """Page faults of one call: what malloc gives back to the kernel after one call, the next must fetch again."""
    run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def machine() -> dict[str, object]:
    """What a reader must know to judge the numbers."""
    info = octavo.cpu_info()
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "cpu": cpu_name(),
        "isas": list(info.isas),
        "active_isa": info.active,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "octavo": octavo.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "caps": {name: os.environ[name] for name in CAPS if name in os.environ},
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
    }


# The variables that hold Octavo and torch's three back ends to AVX2.
CAPS = {
    "OCTAVO_MAX_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def cpu_name() -> str:
    """Model, family and microarchitecture-telling numbers, because virtual machines often hide the model's name."""
    fields = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.processor() or platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family} model {model})" if family else name
