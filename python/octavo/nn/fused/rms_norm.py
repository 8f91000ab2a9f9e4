# SPDX-License-Identifier: Apache-2.0
"""RMSNorm in one operator, holding the Parameter of the norm whose place it takes."""

from __future__ import annotations

import torch
from torch import nn

from ... import ops


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis.

    weight   [k], the Parameter of the norm that is replaced, so the state_dict stays the same
    eps      added to the mean of the squares
    offset   0, or 1 for models of the Gemma kind, whose weights are stored less 1

    source   Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] to the same shape and dtype."""
        weight = self._parameters["weight"]
        assert weight is not None
        # In float32: 1 + weight would lose the weight's last bits in half precision.
        return ops.rms_norm(x, weight.float() + self.offset if self.offset else weight, self.eps)

    def extra_repr(self) -> str:
        offset = f", offset={self.offset}" if self.offset else ""
        return f"{tuple(self.weight.shape)}, eps={self.eps}{offset}"
