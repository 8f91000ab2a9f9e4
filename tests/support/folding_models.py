# SPDX-License-Identifier: Apache-2.0
"""What tests of folding share: a small model with whatever reader a test wants, and which of its layers are folded."""

import torch
from asserts import assert_within
from torch import nn
from torch.nn import functional as F

import octavo
from octavo.nn import QuantLinear

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 1, 20, 1, 1, 0.1, 1])


class Net(nn.Module):
    """norm -> a -> ReLU -> b, and whatever `use` does with the model, its input and the norm's output."""

    def __init__(self, use=lambda net, x, h: 0.0, setup=lambda net: None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.normal_()
        self.use = use
        setup(self)

    def forward(self, x):
        h = self.norm(x)
        return self.b(F.relu(self.a(h))) + self.use(self, x, h)


def folded(net: nn.Module) -> list[str]:
    """The layers that get smoothed input, after prepare_ and a calibration that must not change the float output."""
    expected = net(X).detach()
    octavo.prepare_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()))
    for _ in range(2):
        with octavo.calibrating(net), torch.no_grad():
            found = net(X)
    # rounding of s, of the weights and of three sums of 8: 2^-23 for each of some 30 numbers
    assert_within(found, expected, 2**-18 * expected.abs().max().item())
    return [name for name in "ab" if getattr(net, name).is_folded]


def quantized_in_place(net: nn.Module) -> tuple[list[str], float]:
    """The layers that get smoothed input, and how far the outputs are from float, dB."""
    with torch.no_grad():
        expected = net(X)
        octavo.quantize_(net, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=[X])
        error = octavo.metrics.sqnr_db(expected, net(X))
    return [name for name in "ab" if type(getattr(net, name)) is QuantLinear], error


def free_tanh(h: torch.Tensor) -> torch.Tensor:
    return torch.tanh(h).sum(-1, keepdim=True)
