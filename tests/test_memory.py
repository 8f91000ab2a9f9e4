# SPDX-License-Identifier: Apache-2.0
"""How much memory a conversion takes, counted from the allocator's own events: no clock, no resident set."""

from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.timing import page_faults

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
