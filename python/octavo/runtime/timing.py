# SPDX-License-Identifier: Apache-2.0
"""Honest timing on a noisy machine: all candidates take turns in one process, and the spread is kept.

Absolute times move with the neighbours of a virtual machine; ratios within one run hold.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

from .cpu import cpu_info

Key = TypeVar("Key", bound=Hashable)  # a candidate's name


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
    candidates: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    limit: float = math.inf,
    contexts: Mapping[Key, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[Key, Times]:
    """Times every candidate in turn, `rounds` times, each turn at least `seconds` long (one call at the least).

    A turn of several calls begins with one untimed call: the neighbour before has left its own data in the caches.
    limit      seconds for all turns of one candidate; a slower one sits out rounds, but gets three turns at the least
    contexts   entered around each turn of the candidates named, outside the clock
    """
    calls, strides = {}, {}
    for name, run in candidates.items():
        with _context(contexts, name):
            run()  # caches, lazy packing, page faults
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
        calls[name] = max(1, round(seconds / taken))
        turns = max(3, min(rounds, int(limit / (taken * calls[name])) if limit < math.inf else rounds))
        strides[name] = max(1, rounds // turns)
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name, run in candidates.items():
            if turn % strides[name] == 0:
                with _context(contexts, name):
                    samples[name].append(_one_turn(run, calls[name]))
    return {name: Times.of(times) for name, times in samples.items()}


def _one_turn(run: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    if calls > 1:
        run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _context(
    contexts: Mapping[Key, Callable[[], AbstractContextManager[object]]] | None, name: Key
) -> AbstractContextManager[object]:
    return contexts[name]() if contexts and name in contexts else nullcontext()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with `count` threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def page_faults(run: Callable[[], object], calls: int = 5) -> float:
    """How many page faults one call takes: the next call must fetch again what malloc gave back to the kernel."""
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
