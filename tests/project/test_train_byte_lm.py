# SPDX-License-Identifier: Apache-2.0
"""The training script: a file that loads."""

import importlib
from pathlib import Path

import pytest
import torch

from octavo.lab.study import byte_lm

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("train_byte_lm")


def test_what_is_saved_loads_as_the_bfloat16_values(script, tmp_path):
    torch.manual_seed(0)
    model = byte_lm.ByteLM()
    script.save(model, tmp_path / "new" / "model.safetensors")
    loaded = byte_lm.load(tmp_path / "new" / "model.safetensors")
    assert loaded.head.weight is loaded.embedding.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())
