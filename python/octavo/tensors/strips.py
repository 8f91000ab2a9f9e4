# SPDX-License-Identifier: Apache-2.0
"""Numbers of a weight in groups as kernels read them: sixteen rows side by side, one group after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def to_strips(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [n, groups] as kernels of groups read them, [ceil(n / 16), groups, 16], with zeros after the last one."""
    n, groups = rows.shape
    padded = F.pad(rows, (0, 0, 0, -n % 16))
    return padded.reshape(-1, 16, groups).transpose(1, 2).contiguous()


def from_strips(strips: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `to_strips`."""
    rows = strips.transpose(1, 2).reshape(-1, strips.shape[1])[:n]
    return rows.clone(memory_format=torch.contiguous_format)


def rows_of_strips(strips: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [...] of what `to_strips` was given, [..., groups]."""
    return strips[ids // 16, :, ids % 16]
