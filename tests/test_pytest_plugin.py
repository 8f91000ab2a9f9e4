# SPDX-License-Identifier: Apache-2.0
"""The fixture `octavo_accuracy`, as a user's tests have it: found without a conftest, read in three lines."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import octavo


@pytest.fixture
def pair():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))
    return reference, octavo.quantized(reference, octavo.Int8Dynamic())


def test_limits_that_are_kept_give_the_evaluation(octavo_accuracy, pair, record_property, request):
    found = octavo_accuracy(*pair, torch.randn(30, 20), cosine=0.99, bits_per_weight=50)
    assert isinstance(found, octavo.Evaluation) and found.resources.model.latency is None
    assert dict(request.node.user_properties)["octavo_cosine"] == found.output.cosine


def test_limits_that_are_missed_fail(octavo_accuracy, pair):
    with pytest.raises(AssertionError, match="1 of 1 limits missed: sqnr_db is .*, allowed at least 1000"):
        octavo_accuracy(*pair, torch.randn(30, 20), sqnr_db=1000)
    with pytest.raises(TypeError, match="no limit"):
        octavo_accuracy(*pair, torch.randn(30, 20))


USERS_TEST = """
import sys

import pytest

def test_without_octavo():
    assert "torch" not in sys.modules, "the plugin must not cost what torch costs"

@pytest.mark.parametrize("limit", [0.1, 1e-12])
def test_accuracy(octavo_accuracy, limit):
    import torch, octavo
    reference = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    octavo_accuracy(reference, model, torch.randn(100, 64), kind="classifier", kld=limit)
"""


def test_a_users_tests_in_a_process_of_their_own(tmp_path):
    (tmp_path / "test_users.py").write_text(USERS_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 2 passed" in done.stdout, done.stdout
    assert "1 of 1 limits missed: kld is" in done.stdout and "allowed at most 1e-12" in done.stdout
    assert "octavo_pytest" not in done.stdout  # the traceback ends in the user's line
