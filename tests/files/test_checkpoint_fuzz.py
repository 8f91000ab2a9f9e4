# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged checkpoints: `load` and `inspect_checkpoint` give what they promise or raise what they document.

Each damage follows from its seed. JSON is damaged as text and as a tree, without checksums, for else nothing behind
them would be reached; files of tensors are damaged as bytes and in their headers.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo import observers
from octavo.files import safetensors
from octavo.files.compressed_tensors import quantization_config

DOCUMENTED = (ValueError, FileNotFoundError, PermissionError)
STRANGE = [
    None,
    True,
    0,
    -1,
    1 << 70,
    1.5,
    "",
    "0",
    "../x",
    "\ud800",
    "a\0b",
    [],
    {},
    [[]],
    {"": {}},
    [1, "a"],
    10**400,
]
SEEDS = 100  # of each kind of folder and damage


def skeleton(device: str = "meta") -> nn.Module:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model.add_module("again", model[2])
    return model


def octavo_folder(folder: Path) -> None:
    """A layer of each kind that has a field of its own, a prepared one, aliases, buffers."""
    torch.manual_seed(0)
    model = skeleton("cpu")
    smooth = octavo.Int8Static(method=octavo.SmoothQuant(fold=False))
    octavo.quantize_(model, {"0": smooth, "2": octavo.LLMInt8()}, data=[torch.randn(8, 4)])
    octavo.prepare_(model, {"3": octavo.Int8Static(observers.Percentile(99.0)), "*": None}, learn_scales=True)
    model.register_buffer("table", torch.arange(3), persistent=False)
    octavo.save(model, folder)
    config = json.loads((folder / "octavo.json").read_text())
    for key in ("crc32", "files"):
        del config[key]
    (folder / "octavo.json").write_text(json.dumps(config))


def transformers_folder(folder: Path) -> None:
    """compressed-tensors' format in two shards."""
    torch.manual_seed(0)
    state = octavo.quantized(skeleton("cpu"), octavo.Int8Dynamic()).state_dict()
    halves = [{name: t for name, t in state.items() if (name < "3") == first} for first in (True, False)]
    index = {}
    for number, half in enumerate(halves):
        safetensors.write(folder / f"{number}.safetensors", half, half.items())
        index |= dict.fromkeys(half, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    entry = quantization_config(octavo.quantized(skeleton("cpu"), octavo.Int8Dynamic()))
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))


# --- damage ---------------------------------------------------------------------------------------------------------


def places(value, found):
    """(container, key) of everything inside."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        found.append((value, key))
        places(value[key], found)
    return found


def damage_tree(content, dice):
    for _ in range(dice.choice([1, 1, 2])):
        found = places(content, [])
        if not found:
            return content
        (container, key), (other, source) = dice.choice(found), dice.choice(found)
        action = dice.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[dice.choice(["", "x", "0", "name", "again"])] = container.pop(key)
        elif action == 2:
            container[key] = json.loads(json.dumps(other[source]))
        else:
            container[key] = dice.choice(STRANGE)
    return content


def damage_bytes(data: bytes, dice) -> bytes:
    changed = bytearray(data)
    end = len(changed) if dice.random() < 0.5 else min(len(changed), 1200)  # where headers are
    for _ in range(dice.choice([1, 2, 5])):
        at = dice.randrange(end)
        action = dice.randrange(4)
        if action == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif action == 1:
            changed[at] = dice.choice(b'{}[]":,0\\\xff\0')
        elif action == 2:
            del changed[at : at + dice.randrange(9)]
        else:
            changed[at:at] = changed[at : at + dice.randrange(9)]
        end = min(end, len(changed)) or 1
        changed = changed or bytearray(b" ")
    return bytes(changed)


def damage(folder: Path, dice) -> None:
    path = dice.choice(sorted(folder.iterdir()))
    if dice.random() < 0.5:
        path.write_bytes(damage_bytes(path.read_bytes(), dice))
    elif path.suffix == ".json":
        path.write_text(json.dumps(damage_tree(json.loads(path.read_text()), dice)))
    else:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = damage_tree(json.loads(data[8:start]), dice)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


@pytest.mark.parametrize("make", [octavo_folder, transformers_folder])
def test_a_damaged_checkpoint_gives_an_error_that_is_documented_or_is_read(tmp_path, make):
    make(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    outcomes = {"refused": 0, "read": 0}
    for seed in range(SEEDS):
        for path, data in whole.items():
            path.write_bytes(data)
        damage(tmp_path, random.Random(seed))
        for read in (octavo.inspect_checkpoint, lambda folder: octavo.load(folder, skeleton("cpu"))):
            try:
                result = read(tmp_path)
                str(result), getattr(result, "to_dict", dict)()
                outcomes["read"] += 1
            except DOCUMENTED as error:
                assert str(error), seed
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
    assert min(outcomes.values()) > SEEDS // 5
