# SPDX-License-Identifier: Apache-2.0
"""A language model that comes with the sources: 842,496 parameters that predict the next byte of Python code.

A plain pre-norm transformer of nn.Linear modules, trained by tools/train_byte_lm.py. Tests, notebooks and
`octavo study` share it, so that a figure read in one place can be found again in another.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

CHECKPOINT = Path(__file__).with_name("byte_lm.safetensors")  # bfloat16, 1.7 MB


class ByteLM(nn.Module):
    """Gives the logits of the next byte. The blocks have 16 Linear layers; the head shares the embedding's weight.

    source   Radford et al. 2019 (GPT-2): learned positions, pre-norm blocks, tied head
    """

    def __init__(self, *, width: int = 128, blocks: int = 4, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight
        self._initialize()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [batch, bytes], values 0 to 255, at most `context` bytes -> logits float [batch, bytes, 256]."""
        if ids.shape[-1] > self.context:
            raise ValueError(
                f"ByteLM: ids has {ids.shape[-1]} bytes, at most {self.context} are allowed; cut it"
            )
        x = self.embedding(ids) + self.position.weight[: ids.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name in ("embedding.weight", "position.weight"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() == 2:
                # Wider than GPT-2's 0.02, whose width is six times ours. What is added to the residual stream starts
                # smaller, as there.
                adds = name.endswith(("attention.output.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.06 / math.sqrt(2 * len(self.blocks)) if adds else 0.06)


class Block(nn.Module):
    """Attention, then the perceptron, each on its normalized input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CausalAttention(nn.Module):
    """Each byte looks at itself and at those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


def load(path: str | Path = CHECKPOINT) -> ByteLM:
    """The trained model in eval mode and float32; the file's bfloat16 weights are its weights, exactly.

    path     a file of the training script; default: the one beside this module

    Raises: FileNotFoundError if there is none.
    """
    model = ByteLM()
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    model.load_state_dict({**weights, "head.weight": weights["embedding.weight"]})
    return model.requires_grad_(False).eval()
