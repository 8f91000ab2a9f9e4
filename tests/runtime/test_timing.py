# SPDX-License-Identifier: Apache-2.0
"""Candidates take turns; the figures are order statistics of the rounds; faults are counted for each call."""

import mmap
from pathlib import Path

import pytest
import torch

from octavo.runtime.timing import Times, cpu_name, interleaved, machine, page_faults, torch_threads


def test_the_figures_are_order_statistics():
    assert Times.of([3.0, 1.0, 2.0]) == Times(best=1.0, median=2.0, p10=1.2, p90=2.8)
    assert Times.of([0.5]) == Times(0.5, 0.5, 0.5, 0.5)


def test_candidates_take_turns():
    order = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, seconds=0)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3  # two calls each to warm up and to size a turn


def test_a_turn_is_as_many_calls_as_fill_its_time():
    calls = []
    interleaved({"append": lambda: calls.append(None)}, rounds=2, seconds=1e-3)
    assert len(calls) > 10


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="page faults are counted on Linux")
def test_each_page_first_touched_is_a_fault():
    # Python may grow, and other threads fault, at any time; not at every time.
    assert min(page_faults(lambda: None) for _ in range(10)) < 1
    assert page_faults(touch_new_memory) >= SIZE / (2 << 20)  # a huge page holds 2 MB


SIZE = 16 << 20


def touch_new_memory():
    with mmap.mmap(-1, SIZE) as memory:
        memory[::4096] = bytes(SIZE // 4096)


def test_the_machine_is_named():
    assert machine()["cpu"] == cpu_name() and cpu_name()
    assert machine()["active_isa"] in machine()["isas"]


def test_threads_are_as_many_as_before_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
