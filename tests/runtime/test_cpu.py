# SPDX-License-Identifier: Apache-2.0
"""The choice of the instruction set: automatic, capped by the environment, or by use_isa."""

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch

import octavo
from octavo import _C

BUILT = _C.built_isas()

RUN_A_LINEAR = """
import torch, octavo
from octavo import ops, reference
torch.manual_seed(0)
codes, x = torch.randint(-127, 128, (33, 70), dtype=torch.int8), torch.randn(5, 70)
packed, column_sum = ops.pack_weight(codes)
arguments = x, packed, column_sum, torch.rand(33, 1), torch.randn(33), True
assert torch.equal(ops.linear_dynamic(*arguments), reference.linear_dynamic(*arguments))
info = octavo.cpu_info()
print(info.active, *info.isas)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_cpu_info_describes_a_frozen_truth():
    info = octavo.cpu_info()
    assert info.isas[0] == "scalar" and info.active in info.isas
    assert list(info.isas) == [isa for isa in BUILT if isa in info.isas], "slowest first, as built"
    assert info.model and info.reason and info.threads == torch.get_num_threads()
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.active = "scalar"


def test_without_a_cap_the_fastest_isa_is_active():
    environment = {key: value for key, value in os.environ.items() if key != "OCTAVO_MAX_ISA"}
    code = "import octavo; info = octavo.cpu_info(); print(info.active == info.isas[-1])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr


def test_threads_are_torchs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert octavo.cpu_info().threads == 1
    finally:
        torch.set_num_threads(before)


def test_use_isa_nests_and_restores(isa):
    with octavo.use_isa("scalar"):
        assert octavo.cpu_info().active == "scalar"
    assert octavo.cpu_info().active == isa


def test_use_isa_restores_the_automatic_choice_after_an_error():
    before = octavo.cpu_info()
    with pytest.raises(KeyError), octavo.use_isa("scalar"):
        raise KeyError
    assert octavo.cpu_info() == before


def test_blocks_that_overlap_leave_the_automatic_choice():
    """As two threads may enter and leave them: first in, first out."""
    automatic = octavo.cpu_info()
    first, second = octavo.use_isa("scalar"), octavo.use_isa(automatic.isas[-1])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert octavo.cpu_info().active == automatic.isas[-1], "the block that is still open holds"
    second.__exit__(None, None, None)
    assert octavo.cpu_info() == automatic


def test_threads_that_overlap_leave_the_automatic_choice():
    automatic, entered = octavo.cpu_info(), threading.Barrier(8)

    def run(i):
        with octavo.use_isa(automatic.isas[i % len(automatic.isas)]):
            entered.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert octavo.cpu_info() == automatic


def test_use_isa_explains_itself():
    with octavo.use_isa("scalar"):
        assert "use_isa" in octavo.cpu_info().reason


@pytest.mark.parametrize("name", ["", "avx1024", *(isa for isa in BUILT if isa not in _C.runnable_isas())])
def test_asking_for_what_is_not_there_lists_what_is(name):
    before = octavo.cpu_info()
    with pytest.raises(ValueError) as error, octavo.use_isa(name):
        pytest.fail("use_isa let an ISA through that this CPU cannot run")
    assert all(isa in str(error.value) for isa in before.isas)
    assert octavo.cpu_info() == before


@pytest.mark.parametrize("cap", BUILT)
def test_max_isa_caps_and_never_raises_the_choice(cap):
    done = run_python(RUN_A_LINEAR, OCTAVO_MAX_ISA=cap)
    assert done.returncode == 0, done.stderr
    active, *runnable = done.stdout.split()
    assert active == [isa for isa in runnable if BUILT.index(isa) <= BUILT.index(cap)][-1]


def test_an_unknown_cap_is_an_error_that_lists_what_is_built():
    done = run_python("import octavo; octavo.cpu_info()", OCTAVO_MAX_ISA="avx1024")
    assert done.returncode != 0
    assert "ValueError" in done.stderr and "OCTAVO_MAX_ISA" in done.stderr
    assert all(isa in done.stderr for isa in BUILT)
