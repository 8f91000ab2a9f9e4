# SPDX-License-Identifier: Apache-2.0
"""Packed weights share chunks of memory, and nothing else: storages, copies and lifetimes are their own."""

import copy
import ctypes
import gc
import mmap

import pytest
import torch
from torch import nn

import octavo
from octavo.runtime import huge_pages

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are Linux's")


@pytest.fixture(autouse=True)
def new_chunk(monkeypatch):
    monkeypatch.setattr(huge_pages, "_chunk", None)


def chunk():
    return huge_pages._chunk and huge_pages._chunk()


def test_tensors_lie_side_by_side_on_cache_lines():
    a, b = huge_pages.empty((3, 5)), huge_pages.empty((2, 64))
    assert a.data_ptr() % huge_pages.HUGE_PAGE == 0 and b.data_ptr() == a.data_ptr() + 64
    assert a.untyped_storage().nbytes() == 15 and b.untyped_storage().nbytes() == 128


def test_tensors_do_not_overlap():
    tensors = [huge_pages.empty((size,)).fill_(size) for size in range(1, 100)]
    assert all((tensor == size).all() for size, tensor in enumerate(tensors, start=1))


def test_a_full_chunk_is_followed_by_another():
    first, second = (huge_pages.empty((huge_pages.CHUNK_BYTES - 1,)) for _ in range(2))
    first[-1], second[-1] = 1, 2
    assert first[-1] == 1 and abs(first.data_ptr() - second.data_ptr()) >= huge_pages.CHUNK_BYTES


def test_a_chunk_is_freed_with_the_last_of_its_layers():
    layers = [octavo.quantized(nn.Linear(64, 64), octavo.Int8Dynamic()) for _ in range(2)]
    assert chunk() is not None
    del layers[0]
    gc.collect()
    assert chunk() is not None
    layers.clear()
    gc.collect()
    assert chunk() is None


def resident(tensor: torch.Tensor) -> int:
    """Pages of its memory that the kernel holds."""
    page = mmap.PAGESIZE
    first = tensor.data_ptr() // page * page
    count = -(-(tensor.data_ptr() + tensor.numel() - first) // page)
    seen = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(count * page), seen) == 0
    return sum(byte & 1 for byte in seen)


def test_a_layer_that_goes_gives_its_pages_back():
    """All but the two at its ends, of which a neighbour may have a part: one small layer of a model holds little."""
    pages, size = 64, 64 * mmap.PAGESIZE
    before, large, after = (huge_pages.empty((n,)).fill_(1) for n in (100, size, 100))
    view = large[:]
    address = large.data_ptr()
    place = torch.frombuffer(chunk(), dtype=torch.int8, count=size, offset=address - chunk_address())
    assert resident(place) == pages + 1
    del large
    assert resident(place) == pages + 1  # the view holds the storage
    del view
    gc.collect()
    assert resident(place) <= 2
    assert (before == 1).all() and (after == 1).all()


def chunk_address() -> int:
    return torch.frombuffer(chunk(), dtype=torch.int8, count=1).data_ptr()


def test_pages_stay_as_long_as_a_joined_tensor_reads_them():
    parts = [huge_pages.empty((4 * mmap.PAGESIZE // 64, 64)).fill_(value) for value in (1, 2)]
    both = huge_pages.joined(parts)
    assert both is not None
    del parts
    gc.collect()
    assert both.view(2, -1).float().mean(1).tolist() == [1, 2]


def test_without_address_space_memory_is_ordinary(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    for size in (16, huge_pages.CHUNK_BYTES + 1):
        assert huge_pages.empty((size,)).shape == (size,) and chunk() is None


def test_a_copied_layer_has_memory_of_its_own():
    layer = octavo.quantized(nn.Linear(64, 32), octavo.Int8Dynamic())
    clone = copy.deepcopy(layer)
    assert torch.equal(clone.packed, layer.packed)
    assert clone.packed.untyped_storage().nbytes() == layer.packed.numel()
    assert clone.packed.data_ptr() != layer.packed.data_ptr()


def test_a_huge_weight_has_a_chunk_of_its_own():
    tensor = huge_pages.empty((huge_pages.CHUNK_BYTES + 1,))
    tensor[-1] = 1
    assert tensor.data_ptr() % huge_pages.HUGE_PAGE == 0 and chunk() is None


def test_nothing_takes_no_memory():
    assert huge_pages.empty((0, 4, 16, 64)).shape == (0, 4, 16, 64) and chunk() is None


def test_without_huge_pages_memory_is_ordinary(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert huge_pages.empty((16, 4)).shape == (16, 4) and chunk() is None
