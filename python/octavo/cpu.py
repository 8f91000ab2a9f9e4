# SPDX-License-Identifier: Apache-2.0
"""What the CPU can run, which instruction set is active and why, and a way to choose another one.

The choice is made once, at first use, and holds for the whole process. OCTAVO_MAX_ISA=avx2 in the environment caps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import _C

_chosen = ""  # what use_isa asked for; empty: the automatic choice


@dataclass(frozen=True)
class CpuInfo:
    """The CPU as Octavo sees it."""

    model: str
    isas: tuple[str, ...]  # runnable here, slowest first
    active: str
    reason: str  # one sentence: why `active` is the active one
    threads: int  # torch.get_num_threads()


def cpu_info() -> CpuInfo:
    """What this CPU can run and what calls use now. Source: ours (cpuid, xgetbv, and Linux's permission for AMX)."""
    return CpuInfo(
        model=_C.cpu_model(),
        isas=tuple(_C.runnable_isas()),
        active=_C.active_isa(),
        reason=_C.active_reason(),
        threads=_C.thread_count(),
    )


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of one instruction set inside a `with` block, in the whole process; then the previous choice.

    name     one of `cpu_info().isas`
    raises   ValueError, listing what this CPU can run, if it cannot run `name`
    source   ours
    """
    global _chosen
    if not name:
        raise ValueError(f"use_isa: name is empty; this CPU can run {', '.join(_C.runnable_isas())}")
    previous = _chosen
    _C.use_isa(name)
    _chosen = name
    try:
        yield
    finally:
        _C.use_isa(previous)
        _chosen = previous
