# SPDX-License-Identifier: Apache-2.0
"""Every runnable instruction set is covered in one run; what this CPU lacks is printed as not covered."""

import builtins
import gc
import itertools
import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch is imported, here and in the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from operator_arguments import LINEARS

import octavo
from octavo import _C, ops

RUNNABLE = _C.runnable_isas()
NOT_COVERED = [isa for isa in _C.built_isas() if isa not in RUNNABLE]


def _coverage() -> str:
    return f"{_C.cpu_model()}: ISAs covered: {', '.join(RUNNABLE)}; not covered: {', '.join(NOT_COVERED) or 'none'}"


def pytest_addoption(parser):
    parser.addoption(
        "--damaged-files", type=int, default=400, help="how many damaged GGUF files a test reads (20000)"
    )


def pytest_report_header(config):
    return _coverage()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(_coverage())


def pytest_collection_finish(session):
    freeze_what_stays()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem, done=itertools.count(1)):
    if next(done) % 20 == 0:
        freeze_what_stays()


def freeze_what_stays():
    """What importing and compiling have made stays for good: the collector, and whoever asks it for all objects as
    quantize_ does, need not look at a million of them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=RUNNABLE)
def isa(request):
    """Runs the test once with each instruction set of this CPU."""
    with octavo.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same random numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def without_matplotlib(monkeypatch):
    """Importing matplotlib fails, as where it is not installed."""
    real = builtins.__import__

    def importing(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.fixture(params=LINEARS)
def linear(request):
    """A linear operator as f(x, packed, column_sum, weight_scale, bias); module=reference calls the reference's."""
    name, options = LINEARS[request.param]

    def call(*arguments, activation=None, module=ops):
        return getattr(module, name)(*arguments, *options, activation)

    call.op, call.options = getattr(torch.ops.octavo, name).default, options
    return call
