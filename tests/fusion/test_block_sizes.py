# SPDX-License-Identifier: Apache-2.0
"""Blocks that compute something else for other sizes: the program holds for its sizes, the original for all others."""

import pytest
import torch
from fusion_models import IDS, bert
from torch import nn

from octavo.fusion.blocks.blocks import Blocks
from octavo.fusion.fuse import run_steps


class _Layer(nn.Module):
    """A block that looks at the size of its input."""

    def __init__(self, doubles):
        super().__init__()
        self.doubles = doubles
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.second(nn.functional.relu(self.first(x)))
        return x + y + y if self.doubles(x.shape) else x + y


BRANCHES = {
    "long": lambda shape: shape[1] > 64,
    "one token": lambda shape: shape[1] <= 1,
    "one item": lambda shape: shape[0] == 1,
    "even": lambda shape: shape[1] % 2 == 0,
    "many rows": lambda shape: shape[0] * shape[1] > 200,
    "square": lambda shape: shape[0] == shape[1],
    "this length": lambda shape: shape[1] == 16,
    "another length": lambda shape: shape[1] == 5,
}


@pytest.mark.parametrize("doubles", BRANCHES.values(), ids=BRANCHES)
@torch.no_grad()
def test_a_block_that_looks_at_sizes_computes_what_it_did_for_every_size(doubles):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([_Layer(doubles) for _ in range(2)])).eval()
    model.forward = lambda x: model[0][1](model[0][0](x))
    shapes = [(3, 16), (2, 100), (1, 16), (2, 1), (1, 1), (5, 5), (16, 16), (3, 15)]
    inputs = [torch.randn(*shape, 16) for shape in shapes]
    expected = [model(x) for x in inputs]
    run_steps(model, inputs[0], [Blocks()], 0.99)
    for x, y in zip(inputs, expected, strict=True):
        assert (model(x) - y).norm() <= 2**-19 * y.norm(), x.shape


def test_of_one_token_nothing_is_learnt():
    model = bert()
    report = run_steps(model, {"input_ids": IDS[:, :1]}, [Blocks("float32")], 0.99)
    assert {row.reason for row in report.rows} == {"the example has one token only, give a longer one"}
