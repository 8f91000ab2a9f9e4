# SPDX-License-Identifier: Apache-2.0
"""HQQ: at least as close as the original on its own data, never worse than the covering zero point."""

from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo.formats import IntGroup
from octavo.methods.hqq import improved_zero_points

GOLDEN = np.load(Path(__file__).parents[1] / "data/hqq.npz")
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN.files if "/" in name})


def zero_points(
    w: torch.Tensor, bits: int, steps: int, *, round_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 / scale, zero points) [rows] for groups `w` [rows, 64], from where hqq 0.2.8 starts."""
    low, high = w.amin(1), w.amax(1)
    span = high - low
    inverse = torch.where(span <= 1e-4, 1.0, (2**bits - 1) / span).clamp_max(2e4)
    start = -low * inverse
    start = start.round() if round_first else start
    codes = 0, 2**bits - 1
    return inverse, improved_zero_points(w.T.contiguous(), inverse, start, codes, steps, whole=False)


@pytest.mark.parametrize("case", CASES)
def test_groups_are_at_least_as_close_as_those_of_hqq(case):
    """It keeps the zero point of each group that gave the least mean error, where hqq takes the last of all groups."""
    w, bits = torch.tensor(GOLDEN["in"]).reshape(-1, 64), int(case[1])
    inverse, zero = zero_points(w, bits, 20, round_first="rz1" in case)
    codes = (w * inverse[:, None] + zero[:, None]).round().clamp(0, 2**bits - 1)
    ours = ((codes - zero[:, None]) / inverse[:, None] - w).abs().mean(1)
    theirs = (torch.tensor(GOLDEN[case + "/deq"]).reshape(-1, 64) - w).abs().mean(1)
    # Zero points of size z are known to 2^-24 z in float32, and codes have up to 8 bits.
    rounding = 2.0**-22 * (zero.abs() + 256) / inverse
    # A tie of rounding sends a group another way: one in twenty may end elsewhere.
    assert (ours <= theirs + rounding).double().mean() >= 0.95
    scale = torch.tensor(GOLDEN[case + "/scale"])[:, 0]
    np.testing.assert_allclose(1 / inverse, scale, rtol=1e-6)
    # Where its last step was the best one, the codes are the same ones, but for ties of sums in another order.
    is_same = (zero - torch.tensor(GOLDEN[case + "/zero"])[:, 0]).abs() <= 2e-3
    assert is_same.any() and (codes[is_same].numpy() == GOLDEN[case + "/codes"][is_same]).mean() >= 0.999


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mean_error_of_no_group_grows_and_zero_points_stay_codes(bits):
    torch.manual_seed(0)
    w, weights = torch.randn(32, 128) ** 3, IntGroup(bits, 32, False)
    w[0], w[1] = 0, 0.3
    covering, found = weights.qparams(w), octavo.HQQ().qparams(weights, w)
    assert (
        torch.equal(found.scale, covering.scale) and (found.zero_point - weights.qmin).abs().max() < 2**bits
    )

    def mean(q) -> torch.Tensor:
        return (q.quantize(w).dequantize() - w).abs().reshape(32, 4, 32).mean(2)

    assert (mean(found) <= mean(covering) * (1 + 1e-5)).all()


def test_formats_without_zero_points_are_refused():
    with pytest.raises(
        ValueError, match="HQQ improves zero points, and Int4WeightOnly has none; use symmetric=False"
    ):
        octavo.Int4WeightOnly(method=octavo.HQQ())
    with pytest.raises(ValueError, match="steps must be at least 1"):
        octavo.HQQ(0)
