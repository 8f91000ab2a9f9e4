# SPDX-License-Identifier: Apache-2.0
"""Codes of keys and values: how far they are from the floats, how many bytes, and that tokens do not see each other."""

import pytest
import torch
from asserts import assert_bits_equal

from octavo.nn.caches.codes import StateCodes, group_of
from octavo.nn.caches.hadamard import rotated

KINDS = [StateCodes(bits, rotate) for bits in (8, 4) for rotate in (False, True)]


def states(count: int = 9, size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, count, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [64, 80, 96, 128, 18])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_code_is_at_most_half_a_step_away(bits, size):
    x = states(size=size)
    parts = StateCodes(bits).encode(x)
    found = StateCodes(bits).decode(parts, torch.float32)
    groups = (found - x).unflatten(-1, (-1, group_of(size))).abs().amax(-1)
    # A float16 scale is 2**-11 of itself away, which the outermost code sees: of a span of twice the largest, with 4
    # bits, and the minimum is as far away once more. Rounding to float32 is below both.
    largest = x.unflatten(-1, (-1, group_of(size))).abs().amax(-1)
    assert (groups <= parts[1].float() / 2 + 4 * 2**-11 * largest).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_tokens_codes_are_the_same_alone_and_with_others(kind):
    x = states()
    together = kind.encode(x)
    for token in range(x.shape[2]):
        for alone, all_tokens in zip(kind.encode(x[:1, :, token : token + 1]), together, strict=True):
            assert torch.equal(alone, all_tokens[:1, :, token : token + 1])
        read = kind.decode([part[:1, :, token : token + 1] for part in together], torch.float32)
        assert_bits_equal(read, kind.decode(together, torch.float32)[:1, :, token : token + 1].contiguous())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zeros_and_constants_stay_what_they_are(kind):
    for value in (0.0, 1.5):
        x = torch.full((1, 1, 2, 32), value)
        assert torch.allclose(kind.decode(kind.encode(x), torch.float32), x, rtol=2**-7, atol=0)


@pytest.mark.parametrize("size", [2, 16, 64, 80, 96, 7])
def test_rotating_is_orthogonal_and_undoes_itself(size):
    x, y = states(size=size).double(), states(size=size).double().flip(0)
    assert torch.allclose(rotated(rotated(x)), x, atol=1e-12)
    assert torch.allclose((rotated(x) * rotated(y)).sum(-1), (x * y).sum(-1), atol=1e-12)


def test_an_outlier_costs_its_neighbours_less_when_rotated():
    x = states()
    x[..., 5] *= 50
    errors = [
        (kind.decode(kind.encode(x), torch.float32) - x).square().mean()
        for kind in (StateCodes(4), StateCodes(4, rotate=True))
    ]
    assert errors[1] < errors[0]
