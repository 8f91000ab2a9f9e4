# SPDX-License-Identifier: Apache-2.0
"""The Walsh-Hadamard transform: a rotation that spreads a channel's outliers over all channels of its block."""

from __future__ import annotations

import torch


def rotated(states: torch.Tensor) -> torch.Tensor:
    """states [..., D] times the orthonormal Hadamard matrix, in blocks of the largest power of 2 that divides D.

    The matrix is symmetric, so that the same call rotates back, and rotated queries have the products with rotated
    keys that they had before. Sums and differences instead of a product of matrices: a row then has the same bits
    whatever rows are beside it.
    """
    size = states.shape[-1]
    block, width = size & -size, 1
    blocks = states.reshape(-1, block)
    while width < block:
        pairs = blocks.view(-1, block // (2 * width), 2, width)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack([left + right, left - right], 2).view(-1, block)
        width *= 2
    return (blocks * block**-0.5).view(states.shape)
