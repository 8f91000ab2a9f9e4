# SPDX-License-Identifier: Apache-2.0
"""Octavo beside others in one process: threads that call at once, a changing thread count, fork, one OpenMP runtime."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import octavo

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


@pytest.fixture
def layer_and_input():
    torch.manual_seed(0)
    return octavo.quantized(nn.Linear(300, 500), octavo.Int8Dynamic()), torch.randn(200, 300)


def test_threads_that_call_at_once_get_the_bits_of_one(layer_and_input):
    layer, x = layer_and_input
    expected, wrong = layer(x), []

    def call() -> None:
        wrong.extend(not torch.equal(layer(x), expected) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80 and not any(wrong)


def test_first_calls_at_once_pack_the_weight_once(layer_and_input):
    layer, x = layer_and_input
    expected = layer(x)
    fresh = octavo.nn.QuantLinear.from_codes(layer.codes(), layer.weight_scale, layer.bias, layer.scheme)
    outputs: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: outputs.append(fresh(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4 and all(torch.equal(y, expected) for y in outputs)
    assert fresh.is_packed


def test_the_thread_count_may_change_while_another_thread_computes(layer_and_input):
    layer, x = layer_and_input
    expected, before, stop, wrong = layer(x), torch.get_num_threads(), threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            wrong.append(not torch.equal(layer(x), expected))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for count in (1, 2, 3, 1, 4, 2):
            torch.set_num_threads(count)
            assert torch.equal(layer(x), expected)
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(before)
    assert wrong and not any(wrong)


@linux_only
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_with_one_thread_computes(layer_and_input):
    """With more than one, torch's own operators hang after fork as well: its pool does not survive it."""
    layer, x = layer_and_input
    expected = layer(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(layer(x), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


MAPPED_RUNTIMES = """
import re, torch

def runtimes():
    return set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[-.\\w]*\\.so[.\\d]*", open("/proc/self/maps").read()))

torch.ones(100, 1000).exp()  # torch's pool is up
before = runtimes()
import octavo
octavo.quantized(torch.nn.Linear(300, 500), octavo.Int8Dynamic())(torch.randn(200, 300))
assert before and runtimes() == before, (before, runtimes())
"""


@linux_only
def test_octavo_brings_no_openmp_runtime_of_its_own():
    subprocess.run([sys.executable, "-c", MAPPED_RUNTIMES], check=True)
