# SPDX-License-Identifier: Apache-2.0
"""Two processes with DistributedDataParallel: calibrated before wrapping they agree, afterwards it is refused."""

import json
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

import octavo
from octavo.base import distributed

PROCESS = """
import json, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import octavo

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
data = torch.randn(16, 8, generator=torch.Generator().manual_seed(rank)) * (1 + rank)


def prepared(scheme, **options):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    octavo.prepare_(m, scheme, **options)
    for _ in range(scheme.calibration_passes):
        with octavo.calibrating(m), torch.no_grad():
            m(data)
    return m


def said(action):
    try:
        action()
    except ValueError as error:
        return str(error)


def calibrate(m):
    with octavo.calibrating(m):
        m(data)


states = {}
smooth = octavo.Int8Static(method=octavo.SmoothQuant((0.3, 0.7)))
schemes = [octavo.Int8Static(symmetric=False), smooth, octavo.LLMInt8(1.5)]
for scheme in schemes:
    for learn_scales in (False, True):
        m = DistributedDataParallel(prepared(scheme, learn_scales=learn_scales))
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        m(data).square().sum().backward()
        optimizer.step()
        m = m.module
        octavo.freeze_(m)
        key = f"{octavo.schemes.label(scheme)} {learn_scales}"
        states[key] = {name: tensor.double().flatten().tolist() for name, tensor in m.state_dict().items()}
wrapped = DistributedDataParallel(prepared(octavo.Int8Static()))
float_model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
refused = [
    said(lambda: calibrate(wrapped)),
    said(lambda: calibrate(wrapped.module)),
    said(lambda: calibrate(nn.Sequential(wrapped))),
    said(lambda: calibrate(wrapped.module[0])),
    said(lambda: octavo.quantize_(float_model, octavo.Int8Static(), data=[data])),
    said(lambda: octavo.prepare_(float_model, octavo.Int8Dynamic(), learn_scales=True)),
]
octavo.prepare_(float_model, octavo.Int8Dynamic())
del wrapped
alone = said(lambda: calibrate(prepared(octavo.Int8Static())))
print(json.dumps({"states": states, "refused": refused, "alone": alone}))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found():
    """What each of two processes prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_what_is_calibrated_before_wrapping_is_the_same_in_all_processes(found):
    """Although each has seen batches of its own; and still is after a step of training."""
    first, second = (each["states"] for each in found)
    assert len(first) == 6 and first == second


def test_calibrating_a_wrapped_model_is_refused_with_the_remedy(found):
    for each in found:
        for text in each["refused"]:
            assert "DistributedDataParallel of 2 processes" in text and "wrap it then" in text


def test_a_model_that_is_not_wrapped_is_calibrated(found):
    assert [each["alone"] for each in found] == [None, None]


def test_one_process_may_do_as_it_likes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "_wrappers", lambda model: iter(["DistributedDataParallel"]))
    m = nn.Sequential(nn.Linear(2, 2))
    octavo.quantize_(m, octavo.Int8Static(), data=[torch.ones(1, 2)])
