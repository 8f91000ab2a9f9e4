# SPDX-License-Identifier: Apache-2.0
"""What tests of adapters share: a small model with quantized layers, adapters that are no longer as they started, and
what PEFT made of a model of its own (tests/data/peft, made by peft 0.21.2)."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import octavo
from octavo.adaptation.adapt import adapted_layers

PEFT = Path(__file__).parents[1] / "data/peft"
CASES = ("lora", "lora_rs", "lora_bias_partial", "lora_pattern", "lora_dora", "adalora", "ia3")

SCHEMES = {
    "int8": octavo.Int8Dynamic(),
    "int8 static": octavo.Int8Static(),
    "int4": octavo.Int4WeightOnly(group_size=16),
    "affine": octavo.Int4Dynamic(group_size=32, symmetric=False),
    "nf4": octavo.NF4(),
    "half": octavo.HalfWeightOnly(),
}
ADAPTERS = {
    "lora": octavo.LoRA(r=3, alpha=6),
    "rank-stabilized": octavo.LoRA(r=4, alpha=2, rank_stabilized=True),
    "dora": octavo.LoRA(r=2, dora=True),
    "biases": octavo.LoRA(r=2, bias="all", output_bias=True),
    "adalora": octavo.AdaLoRA(init_r=4, target_r=2, total_step=10),
    "ia3": octavo.IA3(),
    "ia3 feedforward": octavo.IA3(feedforward="*2"),
}


class Network(nn.Module):
    """Two linear layers, the second one without bias, as in the model of tests/data/peft."""

    def __init__(self, k: int = 16, hidden: int = 24, n: int = 12):
        super().__init__()
        self.fc1 = nn.Linear(k, hidden)
        self.fc2 = nn.Linear(hidden, n, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def quantized_network(scheme=SCHEMES["int4"], k: int = 48, hidden: int = 64, n: int = 40) -> Network:
    torch.manual_seed(0)
    model = Network(k, hidden, n)
    octavo.quantize_(model, scheme, data=torch.randn(8, k))
    return model


def inputs(rows: int = 5, k: int = 48) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(1))


def train_a_little_(model: nn.Module, seed: int = 2, size: float = 0.1) -> None:
    """Moves every number of the adapters, so that none has the value that it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def peft_outputs() -> dict[str, torch.Tensor]:
    with np.load(PEFT / "outputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def peft_base() -> Network:
    """The float model that the adapters in tests/data/peft belong to."""
    model = Network()
    model.load_state_dict(
        {name[3:]: value for name, value in peft_outputs().items() if name.startswith("sd/")}
    )
    return model
