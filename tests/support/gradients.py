# SPDX-License-Identifier: Apache-2.0
"""What tests of fake quantization share: gradients of a weighted sum, and scales in a shape to compute with."""

from __future__ import annotations

import torch


def gradients(function, x, *others):
    """Of sum(weights * function(x, *others)) with respect to x and every other tensor that wants one."""
    x = x.detach().clone().requires_grad_()
    y = function(x, *others)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (weights * y).sum().backward()
    return x.grad, weights


def by_row(values, x):
    """A scale (or zero point) of shape [], [1] or [rows], to be broadcast with x."""
    return values.reshape(-1, *[1] * (x.dim() - 1))
