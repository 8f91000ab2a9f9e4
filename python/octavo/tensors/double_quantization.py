# SPDX-License-Identifier: Apache-2.0
"""Double quantization: the scales of small blocks, less their mean, become bytes with a scale for 256 of them.

The rule is that of bitsandbytes on CPUs, byte by byte. It looks numbers up in a grid of 2^16 of them and so is not
quite the nearest value: a difference of 0 becomes 2.1e-5 of the largest one. The formulas: docs/numerics.md, eq. 82.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 256
GRID = 2**16
SMALLEST_DIVISOR = 1e-38  # its inverse is finite
# torch adds fewer numbers than this on one thread, in an order of its own; more are added in pieces, so that the sum
# does not depend on how many threads there are.
PIECE = 2**15 - 1


class DoubleQuantized(NamedTuple):
    """codes uint8 [...]; absmax float32 [ceil(count / 256)], of neighbours in flattened codes; offset float32 [1]"""

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Float32, in the shape of the codes."""
        values = DYNAMIC_MAP.to(self.codes.device)[self.codes.reshape(-1).int()]
        absmax = self.absmax.repeat_interleave(BLOCK)[: values.numel()]
        return (values * absmax + self.offset).reshape(self.codes.shape)

    def follows_from_scale(self) -> bool:
        """Whether `codes_of_scale` gives the codes: no two of a block's 256 values are one float32."""
        return torch.equal(codes_of_scale(self.dequantize(), self.absmax, self.offset), self.codes)


def codes_of_scale(scale: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The lowest codes that stand for `scale`, uint8, of its shape: the inverse of `DoubleQuantized.dequantize`."""
    values = DYNAMIC_MAP * absmax[:, None] + offset
    blocks = torch.nn.functional.pad(scale.reshape(-1), (0, -scale.numel() % BLOCK)).reshape(-1, BLOCK)
    codes = torch.searchsorted(values, blocks).clamp_(max=255)
    return codes.to(torch.uint8).reshape(-1)[: scale.numel()].reshape(scale.shape)


def double_quantize(scale: torch.Tensor) -> DoubleQuantized:
    """`scale` float32 of any shape, finite.

    raises   ValueError if its sum is beyond float32
    source   Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3; bitsandbytes 0.50, `quantize_4bit` and
             `quantize_blockwise` on CPUs
    """
    values = scale.reshape(-1)
    pieces = [piece.sum() for piece in values.split(PIECE)]
    offset = (torch.stack(pieces).sum() / max(values.numel(), 1)).reshape(1)
    if not torch.compiler.is_compiling() and not offset.isfinite().all():
        raise ValueError(
            "double quantization: the sum of the scales is beyond float32; use double_quant=False"
        )
    blocks = torch.nn.functional.pad(values - offset, (0, -values.numel() % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    normalized = blocks * (1 / absmax.clamp_min(SMALLEST_DIVISOR))[:, None]
    nodes = ((normalized + 1) * 0.5 * (GRID - 1) + 0.5).int().clamp_(0, GRID - 1)
    codes = torch.where(absmax[:, None] > 0, _NEAREST_AT_NODES.to(scale.device)[nodes], 0)
    return DoubleQuantized(codes.reshape(-1)[: values.numel()].reshape(scale.shape), absmax, offset)


def _dynamic_map() -> torch.Tensor:
    """The 256 values of the bytes, ascending: seven decades, each with twice as many values as the one below, of both
    signs, 0 and 1.

    source   Dettmers 2016 (arXiv:1511.04561), section 2; bitsandbytes 0.50, `create_dynamic_map`
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        middles = 10 ** (decade - 6) * ((edges[1:] + edges[:-1]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _nearest_at_nodes() -> torch.Tensor:
    """The code nearest to -1 + 2 i / (2^16 - 1), uint8 [2^16]; a tie goes to the lower one."""
    values = DYNAMIC_MAP.double()
    nodes = -1 + 2 * torch.arange(GRID, dtype=torch.float64, device="cpu") / (GRID - 1)
    return torch.bucketize(nodes, (values[1:] + values[:-1]) / 2).to(torch.uint8)


# Made on import and not on use, which may be while a graph is traced.
DYNAMIC_MAP = _dynamic_map()
_NEAREST_AT_NODES = _nearest_at_nodes()
