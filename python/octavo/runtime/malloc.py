# SPDX-License-Identifier: Apache-2.0
"""What glibc's malloc keeps of freed memory, and what it hands back to the kernel: too little after a conversion, too
much between forward passes, each of which then takes a page fault for every 4 KB of its activations.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc accepts no more


def keep_memory(megabytes: int = 512) -> bool:
    """Lets malloc keep up to `megabytes` of freed memory, and serve buffers up to 32 MB from it.

    This is for models that run again and again in one process: MiniLM at 8 x 128 tokens takes a sixth less time. It
    concerns the whole process, above all the buffers of PyTorch, until the process ends. From outside it is done by:
    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=536870912

    returns  True if malloc took it; False if the C library is not glibc, where nothing is done
    raises   ValueError if megabytes is not positive
    """
    if megabytes <= 0:
        raise ValueError(
            f"keep_memory: megabytes is {megabytes}, a positive number is needed; the default is 512"
        )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim = min(int(megabytes) << 20, 2**31 - 1)  # mallopt takes an int
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, trim))


def give_back() -> None:
    """Hands all freed memory back to the kernel; does nothing where the C library cannot.

    Float weights that are freed one by one lie between the integer ones made meanwhile, and malloc keeps such gaps.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
