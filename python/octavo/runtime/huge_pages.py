# SPDX-License-Identifier: Apache-2.0
"""Memory for packed weights, on huge pages that many layers share.

With one row of activations a layer takes as long as its weights take from memory, and through pages of 4 KB that is 10
to 20 % longer than through pages of 2 MB (Zen 4). Most layers are too small for huge pages of their own, so layers that
are packed one after another lie in one chunk. Only what they fill is resident. A chunk is freed with its last layer.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

CHUNK_BYTES = 32 << 20
HUGE_PAGE = 2 << 20
LINE = 64  # where a kernel reads a line of a strip with one access to the cache

_lock = threading.Lock()
_chunks: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # that hold a layer
_chunk: weakref.ref[mmap.mmap] | None = None  # the one that is being filled, if any of its layers is alive
_used = 0  # bytes of it


def empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialized int8 tensor of `shape`, with a storage of its own."""
    count = prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or count == 0:
        return _ordinary(shape)
    try:
        chunk, offset = _new_chunk(count) if count > CHUNK_BYTES else _place(count)
    except OSError:  # no address space for a chunk, or a chunk too many: there may be room for the layer
        return _ordinary(shape)
    tensor, room = _tensor(chunk, offset, count)
    weakref.finalize(room, _give_back, chunk, offset, count).atexit = False
    return tensor.view(shape)


def _ordinary(shape: tuple[int, ...]) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=torch.int8, device="cpu")
    except RuntimeError as error:  # of torch's allocator: it has no class of its own for this
        raise MemoryError(f"out of memory: packed weights need {prod(shape)} bytes") from error


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over the memory of `tensors`, along the first axis, if they lie one behind another; else None."""
    first, total = tensors[0], sum(tensor.numel() for tensor in tensors)
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.shape[1:] != first.shape[1:]:
            return None
        end += tensor.numel()
    for chunk in list(_chunks):
        offset = first.data_ptr() - _address(chunk)
        if 0 <= offset and offset + total <= len(chunk):
            tensor, room = _tensor(chunk, offset, total)
            room.parts = tuple(tensors)  # their pages must stay
            return tensor.view(-1, *first.shape[1:])
    return None


def _tensor(chunk: mmap.mmap, offset: int, count: int) -> tuple[torch.Tensor, Any]:
    """An int8 tensor of `count` bytes of the chunk, and an object that lives as long as the tensor's storage does.

    The object holds the chunk, so a chunk lives as long as any tensor in it.
    """
    room = (ctypes.c_int8 * count).from_buffer(chunk, offset)
    return torch.frombuffer(room, dtype=torch.int8), room


def _give_back(chunk: mmap.mmap, offset: int, count: int) -> None:
    """Frees the pages that lie wholly in these bytes; those at the ends may hold a neighbour's."""
    first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (offset + count) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        chunk.madvise(mmap.MADV_DONTNEED, first, size)


def _place(count: int) -> tuple[mmap.mmap, int]:
    """Finds room for `count` bytes; returns the chunk and the offset in it."""
    global _chunk, _used
    with _lock:
        chunk = _chunk() if _chunk is not None else None
        if chunk is None or _used + count > len(chunk):
            chunk, _used = _new_chunk(CHUNK_BYTES)
            _chunk = weakref.ref(chunk)
        offset, _used = _used, _used + -(-count // LINE) * LINE
    return chunk, offset


def _new_chunk(size: int) -> tuple[mmap.mmap, int]:
    """A new chunk of at least `size` bytes, and the offset of its first huge page."""
    chunk = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    chunk.madvise(mmap.MADV_HUGEPAGE)
    _chunks.add(chunk)
    return chunk, -_address(chunk) % HUGE_PAGE


def _address(chunk: mmap.mmap) -> int:
    return torch.frombuffer(chunk, dtype=torch.int8, count=1).data_ptr()
