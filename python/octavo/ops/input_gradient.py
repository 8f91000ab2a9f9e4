# SPDX-License-Identifier: Apache-2.0
"""grad_x = grad_y @ weight for a packed weight, of which a few rows at a time are floats.

Each tile of rows is dequantized, multiplied and forgotten, so that training beside a frozen layer needs the memory of
its activations and of one tile. Where somebody records or transforms the backward pass itself (second derivatives,
torch.func, torch.compile), the weight is one tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Elements of a tile: 2 MB of floats, which a core's share of the last cache holds. Smaller tiles take more calls.
TILE = 1 << 19

# rows(begin, end) gives these rows of the weight as floats [end - begin, k]; begin is a multiple of 16.
Rows = Callable[[int, int], torch.Tensor]


def input_gradient(grad_y: torch.Tensor, rows: Rows, n: int, k: int) -> torch.Tensor:
    """grad_y [..., n] @ weight [n, k] -> [..., k] in grad_y's dtype, with products and sums in float32.

    source   docs/numerics.md, eq. 11 and 128
    """
    step = max(16, TILE // max(k, 1) // 16 * 16)
    if n <= step or _is_recorded(grad_y):
        return (grad_y.float() @ rows(0, n).float()).to(grad_y.dtype)
    flat = grad_y.reshape(-1, n)
    with torch.autocast("cpu", enabled=False):  # somebody may call backward() inside of autocast
        total = flat[:, :step].float() @ rows(0, step)
        for begin in range(step, n, step):
            end = min(begin + step, n)
            total.addmm_(flat[:, begin:end].float(), rows(begin, end))
    return total.to(grad_y.dtype).reshape(*grad_y.shape[:-1], k)


def _is_recorded(grad_y: torch.Tensor) -> bool:
    """Whether the backward pass becomes part of a graph, or runs inside of a transformation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and grad_y.requires_grad)
    )
