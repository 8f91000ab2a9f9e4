# SPDX-License-Identifier: Apache-2.0
"""How much memory layers and conversions take: by the events of torch's allocator, and in fresh processes on Linux by
what the kernel counts as resident. No clock.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo import ops
from octavo.runtime.timing import page_faults

SCHEME = octavo.Int8Dynamic()


def memory(action) -> tuple[int, int]:
    """(highest, last) number of bytes that torch's CPU allocator held of what `action` allocated, while it ran."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    del result  # only now: it belongs to what is held at the end
    return highest, held


@pytest.fixture(autouse=True)
def packed_weights_are_counted(monkeypatch):
    """They come from torch's allocator where there are no huge pages to share."""
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)


WIDTH, DEPTH = 256, 8
LAYER = WIDTH * WIDTH * 4  # bytes of a float weight


def big_model() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])


def test_memory_accounting_sees_allocations_and_releases():
    def action():
        first = torch.empty(1000, dtype=torch.int8)
        del first
        return torch.empty(500, dtype=torch.int8)

    assert memory(action) == (1000, 500)


@pytest.mark.parametrize("scheme", [SCHEME, octavo.Int8Static(octavo.observers.MinMax())], ids=repr)
def test_in_place_the_peak_is_the_model_plus_one_layer(scheme):
    """Calibration included: prepared layers hold the float weights themselves, and freezing drops them one by one."""
    reports = []

    def action():
        m = big_model()
        reports.append(octavo.quantize_(m, scheme, data=torch.ones(1, WIDTH)))
        return m

    highest, last = memory(action)
    assert last == reports[0].bytes_after < reports[0].bytes_before == DEPTH * LAYER
    assert highest <= (DEPTH + 1) * LAYER


def test_the_memory_test_fails_if_weights_are_held_elsewhere():
    def action():
        m = big_model()
        held = list(m)
        octavo.quantize_(m, SCHEME)
        return m, held

    highest, _ = memory(action)
    assert highest > (DEPTH + 1) * LAYER


def test_quantized_never_copies_the_float_weights():
    m = big_model()
    highest, last = memory(lambda: octavo.quantized(m, SCHEME))
    fast = octavo.quantized(m, SCHEME)
    size = sum(tensor.nbytes for tensor in [*fast.parameters(), *fast.buffers()])
    assert last == size < DEPTH * LAYER
    assert highest <= size + LAYER


def test_loading_packs_codes_straight_from_the_file(tmp_path):
    octavo.save(octavo.quantized(big_model(), SCHEME), tmp_path)
    with torch.device("meta"):
        skeleton = big_model()
    highest, last = memory(lambda: octavo.load(tmp_path, skeleton))
    # The allocator counts the mapped file as its own; a copy of the codes would come on top of that. The sums of one
    # layer are there twice for a moment, without and with the list behind them.
    sums = 4 * max(
        layer.out_features for layer in skeleton.modules() if isinstance(layer, octavo.nn.QuantLinear)
    )
    assert highest <= last + (tmp_path / "model.safetensors").stat().st_size + sums


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the kernel gives no huge pages"
)
def test_a_large_output_lies_on_huge_pages():
    """64 MB are 16,384 small pages or 32 huge ones; a few more for the ends and if memory is fragmented."""
    codes = torch.zeros(1024, 16384, dtype=torch.int8)
    scale, zero_point = torch.ones(1024), torch.zeros(1024, dtype=torch.int32)
    faults = page_faults(lambda: octavo.ops.dequantize(codes, scale, zero_point, torch.float32))
    assert faults < 16384 / 4


def test_packing_allocates_what_it_returns_and_nothing_else():
    """So no copy is made on the way: every code is read where it is and written where it will be used."""
    n, k = 256, 640  # whole strips and tiles: no padding
    codes = torch.zeros(n, k, dtype=torch.int8)
    highest, last = memory(lambda: ops.pack_weight(codes))
    assert highest == last == n * k + n * 4


# --- what the kernel counts -----------------------------------------------------------------------------------------

PROLOGUE = """
import ctypes, json
from pathlib import Path
import torch, octavo
from torch import nn

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be counted whole
THREADS = 2
torch.set_num_threads(THREADS)

def resident():  # bytes, without mapped files
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1]) * 1024

def convert(width, depth):  # to a quantized model, the bytes resident before, and those of its floats
    before = resident()
    m = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    as_float = resident() - before
    octavo.quantize_(m, octavo.Int8Dynamic())
    return m, before, as_float

warm = convert(1024, 1)[0](torch.ones(64, 1024))  # threads, code and small buffers come with the first layer
"""

linux = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/status").exists(),
    reason="reads /proc, and only glibc's malloc gives memory back on request",
)


def in_a_fresh_process(script: str) -> Any:
    """What the script prints, as JSON."""
    command = [sys.executable, "-c", PROLOGUE + script]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@linux
def test_a_layer_that_ran_is_held_once_with_less_than_a_megabyte_for_each_thread():
    grown, size, threads = in_a_fresh_process("""
m, before, _ = convert(4096, 1)
m(torch.ones(1024, 4096))
ctypes.CDLL(None).malloc_trim(0)  # the input and the output are nobody's any more
print(json.dumps([resident() - before, sum(t.nbytes for t in m.state_dict().values()), THREADS]))
""")
    assert 4096 * 4096 < size < 17e6
    huge_page = 2**21  # the last one of the weight is resident as a whole, where the kernel gives such pages
    assert grown < size + huge_page + threads * 1e6  # a second copy of the codes would be 16.8e6 more


@linux
def test_a_process_shrinks_to_its_quantized_model():
    """The kernel gets back what the float weights took, though they lay between the integer ones."""
    depth, pages = 64, 8  # of each layer four tensors, none of which begins or ends at a page's edge
    as_float, grown, size = in_a_fresh_process(f"""
m, before, as_float = convert(512, {depth})
print(json.dumps([as_float, resident() - before, sum(t.nbytes for t in m.state_dict().values())]))
""")
    assert as_float > 4 * 512 * 512 * depth * 0.9
    assert grown < size + depth * pages * 4096 + 2e6  # 2e6: Python's own objects, 10 kB for each module


@linux
def test_each_thread_is_the_first_to_touch_its_part_of_a_packed_weight():
    """The kernel places a page near the thread that first writes it; the same threads read the same columns later."""
    faults = in_a_fresh_process("""
def page_faults():  # of each thread: the 10th field of its stat, the 8th behind the name
    stats = [task.read_text() for task in Path("/proc/self/task").glob("*/stat")]
    return {stat.split()[0]: int(stat.rpartition(")")[2].split()[7]) for stat in stats}

codes = torch.ones(4096, 4096, dtype=torch.int8)
before = page_faults()
packed = octavo.ops.pack_weight(codes)
print(json.dumps(sorted(count - before[thread] for thread, count in page_faults().items())[-2:]))
""")
    # Half of the weight is 8 MB: 2,048 pages of 4 KB, which are x86's; a thread that wrote none of it has a handful.
    assert min(faults) > 1000
