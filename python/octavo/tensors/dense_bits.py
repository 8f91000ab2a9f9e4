# SPDX-License-Identifier: Apache-2.0
"""Codes of a few bits in a row of int32 words, one code right behind the other, the lowest bits of a word first.

Code j of a row has the bits j * bits and those above it; where 32 is no multiple of `bits`, some codes lie in two
words. So 32 codes take `bits` words. Source: compressed-tensors 0.20.0, `pack_to_int32`.
"""

from __future__ import annotations

import torch

ROWS = 1 << 18  # codes that are worked on at a time: they and their words stay in the cache


def words_for(count: int, bits: int) -> int:
    """How many words a row of `count` codes takes."""
    return -(-count * bits // 32)


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`codes` uint8 [rows, count], below 2^bits, as int32 [rows, words_for(count, bits)]; what is left over is 0."""
    rows, count = codes.shape
    words = codes.new_zeros(rows, -(-count // 32) * bits, dtype=torch.int32)
    for part, packed in zip(_parts(codes), _parts(words, count), strict=True):
        for j in range(min(count, 32)):
            column = part[:, j::32].int()
            word, shift = divmod(j * bits, 32)
            packed[:, word::bits][:, : column.shape[1]] |= column << shift
            if shift + bits > 32:
                packed[:, word + 1 :: bits][:, : column.shape[1]] |= column >> (32 - shift)
    return words[:, : words_for(count, bits)].contiguous()


def from_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `to_words`: uint8 [rows, count]."""
    rows = len(words)
    whole = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    codes = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
    for part, packed in zip(_parts(codes), _parts(whole, count), strict=True):
        for j in range(min(count, 32)):
            column = part[:, j::32]
            word, shift = divmod(j * bits, 32)
            code = packed[:, word::bits][:, : column.shape[1]] >> shift  # signed: ones may come in from above
            if shift + bits > 32:
                low = 32 - shift
                above = packed[:, word + 1 :: bits][:, : column.shape[1]] << low
                code = (code & (1 << low) - 1) | above
            column.copy_(code & (1 << bits) - 1)
    return codes


def _parts(matrix: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, ...]:
    """`matrix` cut into rows that hold about ROWS codes, `count` to a row."""
    return matrix.split(max(ROWS // max(count or matrix.shape[1], 1), 1))
