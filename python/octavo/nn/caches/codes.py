# SPDX-License-Identifier: Apache-2.0
"""StateCodes: keys or values as codes of 8 or 4 bits, with a scale for each token and group of a head's channels.

A token's codes depend on that token alone. So they are appended and cut off like floats, and are the same whether
tokens came one by one or together. Scales for channels of keys (KIVI, arXiv:2402.02750) need a block of tokens at once;
they have less than half of the KL divergence of 4-bit codes here (SmolLM2), so they are what to try next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .hadamard import rotated

GROUP = 32  # channels that share a scale, where a head's channels can be divided so
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class StateCodes:
    """How states become codes, and codes states.

    bits      8: symmetric codes, int8. 4: codes 0 .. 15 with a minimum, two in a byte, channel c beside c + 1
    rotate    whether the Hadamard rotation comes before: for keys, whose outliers stay in the same channels
    """

    bits: int
    rotate: bool = False

    def encode(self, states: torch.Tensor) -> list[torch.Tensor]:
        """[B, H, n, D] floats -> codes [B, H, n, D * bits / 8], scales [B, H, n, D / group] float16 and, with 4 bits,
        minimums like the scales. States that are not finite give NaN for their group, or zeros: float16 ends at 65504.

        raises   ValueError for an odd D with 4 bits
        """
        states = states.detach().float()
        states = rotated(states) if self.rotate else states
        groups = states.unflatten(-1, (-1, group_of(states.shape[-1])))
        return self._encode_int8(groups) if self.bits == 8 else self._encode_int4(groups)

    def decode(self, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The states that `encode` made `parts` of, as `dtype`."""
        codes, scales = parts[0], parts[1].float().unsqueeze(-1)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        groups = codes.unflatten(-1, (scales.shape[-2], -1)).float() * scales
        if self.bits == 4:
            groups += parts[2].float().unsqueeze(-1)
        states = groups.flatten(-2)
        return (rotated(states) if self.rotate else states).to(dtype)

    @staticmethod
    def _encode_int8(groups: torch.Tensor) -> list[torch.Tensor]:
        scales = (groups.abs().amax(-1) / 127).half()
        codes = (groups / _divisor(scales)).round_().clamp_(-127, 127)
        return [codes.to(torch.int8).flatten(-2), scales]

    @staticmethod
    def _encode_int4(groups: torch.Tensor) -> list[torch.Tensor]:
        low, high = groups.aminmax(dim=-1)
        minimums = low.half()
        scales = ((high - minimums.float()) / 15).half()
        codes = ((groups - minimums.float().unsqueeze(-1)) / _divisor(scales)).round_().clamp_(0, 15)
        codes = codes.to(torch.uint8).flatten(-2)
        return [codes[..., 0::2] | codes[..., 1::2] << 4, scales, minimums]


def group_of(size: int) -> int:
    """How many of a head's `size` channels share a scale: 32, 16, or all where neither divides them."""
    return next((group for group in (GROUP, GROUP // 2) if size % group == 0), size)


def check_head_size(bits: int, size: int) -> None:
    """raises   ValueError for channels that do not fill bytes"""
    if size * bits % 8:
        raise ValueError(
            f"KVCache: heads of {size} channels, an even number is needed for int4; use dtype='int8'"
        )


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; 1 for those that are 0: their codes are 0."""
    floats = scales.float()
    return torch.where(floats == 0, torch.ones_like(floats), floats).unsqueeze(-1)
