# SPDX-License-Identifier: Apache-2.0
"""What the CPU can run, which instruction set is active and why, and a way to choose another one.

The choice is made once, at first use, and holds for the whole process. OCTAVO_MAX_ISA=avx2 in the environment caps it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _C

_lock = threading.Lock()
_choices: list[_Choice] = []  # of the `with` blocks that are open, in any thread; the last one entered holds


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


class _Choice:
    """The instruction set that one `with` block asked for; two blocks may ask for the same one."""

    def __init__(self, name: str):
        self.name = name


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Inside a `with` block, the whole process runs the kernels of one instruction set; afterwards the previous choice.

    Blocks of several threads may overlap and end in any order: of those still open, the one entered last holds in all
    threads, and after the last of them the automatic choice.

    name     one of `cpu_info().isas`
    raises   ValueError, listing what this CPU can run, if it cannot run `name`
    source   ours
    """
    if not name:
        raise ValueError(f"use_isa: name is empty; this CPU can run {', '.join(_C.runnable_isas())}")
    choice = _Choice(name)
    with _lock:
        _C.use_isa(name)
        _choices.append(choice)
    try:
        yield
    finally:
        with _lock:
            _choices.remove(choice)
            _C.use_isa(_choices[-1].name if _choices else "")
