# SPDX-License-Identifier: Apache-2.0
"""Rows of packed weights: the whole weight as floats, and the rows of that."""

from __future__ import annotations

from typing import Any

import torch

from .groups import dequantize_groups
from .half import unpack_half


def embedding_groups(
    ids: torch.Tensor, weight: tuple[Any, ...], k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """As octavo.ops.embedding_groups, of an ops.GroupWeight."""
    return dequantize_groups(weight, k, dtype)[ids.long()]


def embedding_half(
    ids: torch.Tensor, packed: torch.Tensor, n: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """As octavo.ops.embedding_half."""
    return unpack_half(packed, n, packed.shape[1])[ids.long()].to(dtype)
