# SPDX-License-Identifier: Apache-2.0
"""Folders that bitsandbytes has quantized: read without loss, refused by name where octavo has no such blocks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from asserts import assert_bits_equal
from safetensors.torch import load_file, save_file
from torch import nn

import octavo

DATA = Path(__file__).parents[1] / "data"
STATE = "0.weight.quant_state.bitsandbytes__nf4"


def tensors() -> dict[str, torch.Tensor]:
    """Of Linear4bit(128, 32), NF4 with double quantization, as bitsandbytes 0.50 has written it."""
    found = load_file(DATA / "bitsandbytes_linear4bit.safetensors")
    return {f"0.{name}": tensor for name, tensor in found.items()}


def state_of(found: dict[str, torch.Tensor]) -> dict:
    return json.loads(bytes(found[STATE].tolist()))


def folder(path: Path, found: dict[str, torch.Tensor], **state) -> Path:
    if state:
        text = json.dumps({**state_of(found), **state}).encode()
        found = {**found, STATE: torch.tensor(list(text), dtype=torch.uint8)}
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file(found, path / "model.safetensors")
    return path


def skeleton(k: int = 128, n: int = 32) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(k, n))


def test_what_was_written_is_read_bit_for_bit_and_computes_what_it_computed(tmp_path):
    golden, found = np.load(DATA / "bitsandbytes_4bit.npz"), tensors()
    layer = octavo.load(folder(tmp_path, found), skeleton())[0]
    assert layer.scheme == octavo.NF4(activations="int16")
    assert_bits_equal(layer.dequantize(), torch.from_numpy(golden["linear4bit/deq"]))
    x, y = (torch.from_numpy(golden[f"linear4bit/{name}"]) for name in "xy")
    # The table of integers is off by half a step of 63.
    bound = x.abs() @ (0.5 / 63 * layer.dequantize().abs().amax(1, keepdim=True).expand(32, 128)).T
    assert ((layer(x) - y).abs() <= bound).all()
    state = layer.state_dict()
    assert torch.equal(state["weight_packed"].flatten(), found["0.weight"].flatten())
    assert torch.equal(state["weight_absmax"].flatten(), found["0.weight.absmax"])
    assert torch.equal(state["weight_nested_absmax"], found["0.weight.nested_absmax"])
    contents = octavo.inspect_checkpoint(tmp_path)
    assert [row.name for row in contents.quantized] == ["0"]


def test_plain_scales_and_the_other_table_are_read(tmp_path):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    format = octavo.formats.FP4(32, False)
    stored = format.store(format.qparams(weight).quantize(weight))
    state = {"quant_type": "fp4", "blocksize": 32, "dtype": "bfloat16", "shape": [6, 32]}
    found = {
        "0.weight": stored["weight_packed"].reshape(-1, 1),
        "0.weight.absmax": stored["weight_absmax"].flatten(),
        "0.weight.quant_map": format.codebook.table.clone(),
        "0.weight.quant_state.bitsandbytes__fp4": torch.tensor(list(json.dumps(state).encode())).to(
            torch.uint8
        ),
    }
    layer = octavo.load(folder(tmp_path, found), nn.Sequential(nn.Linear(32, 6, bias=False)))[0]
    assert layer.scheme == octavo.FP4(32, False, activations="int16") and layer.weight.dtype == torch.bfloat16
    assert_bits_equal(layer.dequantize(), format.dequantize(stored, 6, 32))


@pytest.mark.parametrize(
    "state, changed, words",
    [
        ({"shape": [128, 32]}, {}, "blocks of 64 straddle its rows of 32"),
        ({"blocksize": 24}, {}, "block_size must be a multiple of 16"),
        ({"nested_blocksize": 128}, {}, "nested blocks not of 256"),
        ({"shape": [32]}, {}, "not enough values|is damaged"),
        ({"shape": [64, 128]}, {}, "is damaged"),
        ({}, {"0.weight.quant_map": torch.zeros(16)}, "its values are not those of NF4"),
        ({}, {"0.weight.nested_absmax": None}, "is damaged"),
        ({}, {STATE: torch.zeros(5, dtype=torch.uint8)}, "is not JSON"),
    ],
)
def test_what_octavo_cannot_mean_is_refused_by_name(tmp_path, state, changed, words):
    found = {name: tensor for name, tensor in {**tensors(), **changed}.items() if tensor is not None}
    given = skeleton()
    with pytest.raises(ValueError, match=words) as error:
        octavo.load(folder(tmp_path, found, **state), given)
    assert "0.weight" in str(error.value) and type(given[0]) is nn.Linear


def test_eight_bits_are_refused(tmp_path):
    found = {
        "0.weight": torch.zeros(32, 128, dtype=torch.int8),
        "0.SCB": torch.ones(32),
        "0.bias": torch.zeros(32),
    }
    with pytest.raises(ValueError, match="8 bits are not read"):
        octavo.load(folder(tmp_path, found), skeleton())
