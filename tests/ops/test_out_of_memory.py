# SPDX-License-Identifier: Apache-2.0
"""Memory that is not there is a MemoryError that says how much was wanted; sizes beyond int64 are refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo import _C, ops

INT8, HUGE = torch.int8, 2**46
one = torch.zeros(1)
no_codes = torch.empty(0, 2**61, dtype=INT8)


def rows(count, k=64):
    """Many rows that are one row of memory."""
    return torch.zeros(k).expand(count, k)


def layer(k):
    return *ops.pack_weight(torch.zeros(5, k, dtype=INT8)), torch.ones(5, 1)


@pytest.mark.parametrize(
    "bytes_wanted, call",
    [
        (4 * HUGE, lambda: ops.activate(one.expand(HUGE), "relu")),
        (256 * HUGE, lambda: ops.silu_mul(rows(HUGE), rows(HUGE))),
        (256 * HUGE, lambda: ops.rms_norm(rows(HUGE), torch.ones(64), 1e-5)),
        (256 * HUGE, lambda: ops.linear_dynamic(rows(HUGE), *layer(64))),
        (20 * HUGE, lambda: ops.linear_dynamic(torch.empty(HUGE, 0), *layer(0))),
        (64 * HUGE, lambda: ops.attention(*[torch.zeros(1, 1, 1, 16).expand(1, 1, HUGE, 16)] * 3)),
        (
            4 * 2**60,
            lambda: ops.int8_mm(torch.empty(2**30, 0, dtype=INT8), torch.empty(0, 2**30, dtype=INT8)),
        ),
        (4 * HUGE, lambda: ops.choose_qparams(one.expand(HUGE, 1), -127, 127, True)),
        (64 * HUGE, lambda: ops.pack_weight(torch.zeros(1, 1, dtype=INT8).expand(HUGE, 1))),
    ],
)
def test_the_error_says_how_many_bytes(bytes_wanted, call):
    with pytest.raises(MemoryError, match=f"needs {bytes_wanted} bytes"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.pack_weight(no_codes),
        lambda: ops.pack_weight(no_codes.T),
        lambda: ops.pack_weight(torch.zeros(1, 1, dtype=INT8).expand(2**61, 1)),
        lambda: ops.silu_mul(torch.empty(2**61, 0), torch.empty(2**61, 0)),
        lambda: ops.add_norm_codes(torch.empty(2**61, 0), torch.empty(2**61, 0), torch.ones(0), None, 1e-5),
        lambda: ops.linear_dynamic(torch.empty(2**40, 2**20, 0), *layer(0)),
        lambda: ops.int8_mm(torch.empty(2**40, 0, dtype=INT8), torch.empty(0, 2**40, dtype=INT8)),
    ],
)
def test_results_whose_size_leaves_int64_are_refused(call):
    with pytest.raises(ValueError, match="result of shape .* is too large"):
        call()


def test_empty_tensors_of_large_sizes_are_empty():
    """Without elements there may be any number of rows, which a loop must not count."""
    many = 2**52
    assert ops.pack_weight(torch.empty(0, many, dtype=INT8))[0].shape == (0, many // 64, 16, 64)
    assert ops.unpack_weight(torch.empty(0, many, 16, 64, dtype=INT8), 0, 64 * many).shape == (0, 64 * many)
    assert ops.silu_mul(torch.empty(many, 0), torch.empty(many, 0)).shape == (many, 0)
    assert ops.rms_norm(torch.empty(many, 0), torch.empty(0), 1e-5).shape == (many, 0)
    q = torch.empty(many, 2, 3, 0)
    assert ops.rope(q, q, torch.empty(1, 3, 0), torch.empty(1, 3, 0))[0].shape == q.shape


LIMITED = """
import resource, torch, octavo
from octavo import ops
torch.set_num_threads(1)
m, x, codes = torch.nn.Linear(4096, 4096), torch.randn(1 << 20, 16), torch.ones(4096, 4096, dtype=torch.int8)
ops.int8_mm(codes[:2], codes)
octavo.quantized(torch.nn.Linear(64, 64), octavo.Int8Dynamic())(torch.randn(2, 64))
layer = octavo.quantized(torch.nn.Linear(16, 4096), octavo.Int8Dynamic())
layer(x[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
for call in (
    lambda: ops.activate(x, "silu"),
    lambda: layer(x),
    lambda: ops.int8_mm(codes, codes),
    lambda: ops.pack_weight(codes),
    lambda: octavo.runtime.huge_pages.empty((1, 1, 64 << 20)),
):
    try:
        call()
        print("nothing raised")
    except MemoryError as error:
        print("MemoryError:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_process_without_memory_gets_memory_errors_and_nothing_is_printed():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert all(re.match(r"MemoryError: out of memory: .* needs? \d+ bytes", line) for line in lines), lines
    assert not done.stderr


def test_the_module_names_no_folder_of_the_machine_that_built_it():
    binary = Path(_C.__file__).read_bytes()
    for folder in (Path(octavo.__file__).parents[2] / "csrc", Path(torch.__file__).parent / "include"):
        assert str(folder).encode() not in binary
