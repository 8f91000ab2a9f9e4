# SPDX-License-Identifier: Apache-2.0
"""Codes in int32 words: the bits that NumPy puts there, and every code comes back."""

import numpy as np
import torch

from octavo.tensors.dense_bits import from_words, to_words, words_for


def test_words_hold_the_bits_of_the_codes_one_behind_the_other():
    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        for rows, count in [(7, 1), (7, 5), (3, 31), (3, 32), (3, 33), (2, 100), (0, 9), (4, 0)]:
            codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
            words = to_words(codes, bits)
            assert words.dtype == torch.int32 and words.shape == (rows, words_for(count, bits))
            stream = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
            found = np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little")
            assert np.array_equal(found[:, : count * bits], stream.reshape(rows, count * bits))
            assert not found[:, count * bits :].any()
            assert torch.equal(from_words(words, bits, count), codes)


def test_rows_beyond_the_cache_are_worked_on_in_parts():
    codes = (torch.arange(3 * 200_003).reshape(3, -1) % 31).to(torch.uint8)
    assert torch.equal(from_words(to_words(codes, 5), 5, 200_003), codes)
