# SPDX-License-Identifier: Apache-2.0
"""A small model of every kind of tensor, its checkpoint, and ways to change that, for the tests of save and load."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import octavo


class Model(nn.Module):
    """A Linear kept float, tied weights, buffers of both kinds, odd sizes, a layer without bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 21)
        self.body = nn.Sequential(
            nn.Linear(21, 35), nn.ReLU(), nn.Linear(35, 21, bias=False), nn.BatchNorm1d(21)
        )
        self.head = nn.Linear(21, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.arange(21.0), persistent=False)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids) + self.offset))


IDS = torch.arange(11)


def quantized_model(scheme=octavo.Int8Dynamic()) -> nn.Module:
    torch.manual_seed(0)
    return octavo.quantized(Model().eval(), scheme)


def meta_skeleton() -> nn.Module:
    with torch.device("meta"):
        return Model().eval()


def edit_config(folder, change):
    """Without checksums, so that it looks like a file of before there were any."""
    config = json.loads((folder / "octavo.json").read_text())
    config.pop("crc32", None)
    config.pop("files", None)
    change(config)
    (folder / "octavo.json").write_text(json.dumps(config))


def edit_tensors(folder, change, file="model.safetensors"):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file)
    edit_config(folder, lambda config: None)


def check_refused(folder, skeleton, error, message):
    modules = dict(skeleton.named_modules())
    parameters, buffers = dict(skeleton.named_parameters()), dict(skeleton.named_buffers())
    with pytest.raises(error, match=message):
        octavo.load(folder, skeleton)
    assert dict(skeleton.named_modules()) == modules
    assert all(value is parameters[name] for name, value in skeleton.named_parameters())
    assert all(value is buffers[name] for name, value in skeleton.named_buffers())
