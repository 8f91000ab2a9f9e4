# SPDX-License-Identifier: Apache-2.0
"""GPTQ: an oracle written for reading, codes of four other programs, formats, edges, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import octavo
from octavo import GPTQ, ClipSearch, RoundToNearest
from octavo.formats import NF4, Int8, IntGroup
from octavo.methods.compensation import compensated, inverse_factor, living
from octavo.schemes import from_dict, label
from octavo.tensors.granularity import PerChannel, PerGroup
from octavo.tensors.qparams import QParams

GOLDEN = np.load(Path(__file__).parents[1] / "data/gptq_layer.npz")
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN.files if name.endswith("/row_margin")})
FORMATS = [
    IntGroup(4, 32),
    IntGroup(3, 48, False),
    IntGroup(2, None),
    Int8(),
    NF4(32),
    octavo.formats.FP4(64, False),
]
every_format = pytest.mark.parametrize("weights", FORMATS, ids=label)


def inputs(rows: int = 400, k: int = 80) -> torch.Tensor:
    """Correlated channels, a few of them large."""
    torch.manual_seed(1)
    x = torch.randn(rows, k // 4) @ torch.randn(k // 4, k) + 0.3 * torch.randn(rows, k)
    x[:, :3] *= 10
    return x


def weight(n: int = 24, k: int = 80) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k)


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double()


def output_error(q, w: torch.Tensor, x: torch.Tensor) -> float:
    return (x.double() @ (q.dequantize() - w).double().T).square().sum().item()


def oracle(w: torch.Tensor, h: torch.Tensor, qparams: QParams, damping: float) -> torch.Tensor:
    """Columns as they lie: each time the inverse of what is left of H is computed anew."""
    w, codes = w.double().clone(), []
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    for j in range(w.shape[1]):
        q = qparams.quantize(w.float())
        codes.append(q.codes[:, j])
        inverse = torch.linalg.inv(h[j:, j:])
        error = (w[:, j] - q.dequantize()[:, j].double()) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return torch.stack(codes, 1)


@every_format
def test_codes_are_those_of_the_oracle(weights):
    w, h = weight(), gram(inputs())
    qparams = weights.qparams(w)
    found = compensated(w.double(), h, qparams, by_activation=False)
    assert torch.equal(found.codes, oracle(w, h, qparams, 0.01))
    # The order of activations is that of a layer whose columns lie so.
    order = h.diagonal().argsort(descending=True)
    one = IntGroup(4, None).qparams(w)
    in_order = oracle(w[:, order], h[order][:, order], one, 0.01)
    assert torch.equal(compensated(w.double(), h, one).codes[:, order], in_order)


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_other_programs(case):
    """IST-DASLab's GPTQ, AutoGPTQ and GPTQModel agree on these, in rows without an exact tie of rounding."""
    bits, symmetric, _, how, block = case.split("/")
    w, x = (torch.tensor(GOLDEN[name], dtype=torch.float64) for name in ("W", "X"))
    h = 2 / len(x) * gram(x)
    is_dead = h.diagonal() == 0  # the original's way with them
    h[is_dead, is_dead], w[:, is_dead] = 1, 0

    def covering(columns: torch.Tensor) -> QParams:
        return _original_qparams(columns.double(), int(bits[1]), symmetric == "sym")

    parts = [covering(columns) for columns in w.split(32, dim=1)]
    scale, zero_point = (
        torch.stack([getattr(p, name) for p in parts], 1) for name in ("scale", "zero_point")
    )
    static = QParams(scale, zero_point, 0, 2 ** int(bits[1]) - 1, PerGroup(32))
    qparams = static if how.endswith("static") else covering
    options = {"by_activation": how.startswith("act"), "group_size": 32, "block": int(block[1:])}
    codes = compensated(w, h, qparams, **options).codes.numpy()
    is_clear = GOLDEN[case + "/row_margin"] > 1e-6
    assert is_clear.mean() > 0.8 and np.array_equal(codes[is_clear], GOLDEN[case + "/codes"][is_clear])


def _original_qparams(w: torch.Tensor, bits: int, symmetric: bool) -> QParams:
    """The original's `Quantizer.find_params`, with mse=False; a row of zeros gets the range [-1, 1]."""
    low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    is_zero = (low == 0) & (high == 0)
    low, high = torch.where(is_zero, -1.0, low), torch.where(is_zero, 1.0, high)
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    return QParams(scale.float(), zero.int(), 0, 2**bits - 1, PerChannel(0))


@every_format
def test_inputs_without_correlations_leave_plain_rounding(weights):
    w = weight()
    q = weights.qparams(w)
    for h in (torch.eye(80), torch.diag(torch.linspace(1, 5, 80))):
        assert torch.equal(compensated(w, h, q).codes, q.quantize(w).codes)


@pytest.mark.parametrize("by_activation", [True, False])
def test_the_block_size_changes_no_code(by_activation):
    w, h = weight().double(), gram(inputs())
    q = IntGroup(3, 16).qparams(w.float())
    codes = [
        compensated(w, h, q, by_activation=by_activation, block=block).codes for block in (1, 7, 32, 128)
    ]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@every_format
@pytest.mark.parametrize(
    "groups, order", [("static", "activation"), ("static", "ascending"), ("dynamic", "ascending")]
)
def test_the_output_is_closer_than_with_rounding(weights, groups, order):
    w, x = weight(), inputs()
    rounded = RoundToNearest().qparams(weights, w).quantize(w)
    method = GPTQ(groups=groups, order=order, scales=RoundToNearest())
    assert output_error(method.codes(weights, w, gram(x)), w, x) < 0.7 * output_error(rounded, w, x)


@pytest.mark.parametrize("bits", [2, 3])
def test_searched_scales_help_with_few_bits(bits):
    w, x, weights = weight(), inputs(), IntGroup(bits, 32)
    covering = GPTQ(scales=RoundToNearest()).codes(weights, w, gram(x))
    searched = GPTQ(scales=ClipSearch()).codes(weights, w, gram(x))
    assert GPTQ().scales_for(weights) == ClipSearch()
    assert output_error(searched, w, x) < output_error(covering, w, x)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_dead_channels_are_rounded_to_nearest_and_disturb_nobody():
    w, x, weights = weight(), inputs(), IntGroup(4, 16, True, "float32")
    x[:, [5, 70]] = 0
    codes, rest = GPTQ().codes(weights, w, gram(x)).codes, torch.ones(80, dtype=torch.bool)
    rest[[5, 70]] = False
    q = ClipSearch().qparams(weights, w)
    assert torch.equal(codes[:, ~rest], q.quantize(w).codes[:, ~rest])
    assert torch.equal(living(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(
    "case", ["fewer rows than channels", "the same channel twice", "one row", "one column"]
)
def test_singular_statistics_are_damped_until_they_can_be_factored(case, damping):
    x = inputs(20) if case.startswith("fewer") else inputs(1) if case == "one row" else inputs()
    if case == "the same channel twice":
        x[:, 40:] = x[:, :40]
    if case == "one column":
        x = x[:, :1]
    h = gram(x)
    u = inverse_factor(living(h), damping)
    assert u.isfinite().all() and torch.equal(u, u.triu())
    w, weights = weight(k=x.shape[1]), IntGroup(4, 16)
    rounded = ClipSearch().qparams(weights, w).quantize(w)
    assert output_error(GPTQ(damping).codes(weights, w, h), w, x) <= output_error(rounded, w, x) * 1.001


def test_constant_and_one_sided_groups_keep_their_values():
    w, x = weight(), inputs()
    w[0], w[1], w[2] = 0.3, w[1].abs(), 0
    for weights in (IntGroup(8, 16, True, "float32"), IntGroup(8, 16, False, "float32")):
        q = GPTQ().codes(weights, w, gram(x))
        relative = ((q.dequantize() - w) @ x.T).norm(dim=1) / (w @ x.T).norm(dim=1).clamp_min(1e-9)
        assert (relative < 0.02).all() and (q.dequantize()[2] == 0).all()


def test_a_scheme_with_it_goes_to_json_and_back_and_into_a_layer():
    scheme = octavo.Int4WeightOnly(method=GPTQ(0.05, scales=RoundToNearest()))
    assert from_dict(scheme.to_dict()) == scheme
    assert label(scheme) == "Int4WeightOnly(method=GPTQ(0.05, scales=RoundToNearest))"
    x, linear = inputs(), nn.Linear(80, 24, bias=False)
    layer = octavo.quantized(linear, scheme, data=x)
    expected = scheme.method.codes(scheme.weights, linear.weight.detach(), gram(x))
    assert torch.equal(layer.dequantize(), expected.dequantize())


def test_it_needs_data_and_refuses_what_cannot_be():
    linear = nn.Linear(80, 24)
    with pytest.raises(ValueError, match="needs data"):
        octavo.quantized(linear, octavo.Int4WeightOnly(method=GPTQ()))
    model = nn.Sequential(linear)
    octavo.prepare_(model, octavo.Int4WeightOnly(method=GPTQ()))
    with pytest.raises(ValueError, match="layer '0' is not calibrated: GPTQ learns from its inputs"):
        octavo.freeze_(model)
    x = inputs()
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="reads NaN or Inf on this data"):
        octavo.quantized(linear, octavo.Int4WeightOnly(method=GPTQ()), data=x)
    for options, text in (
        ({"damping": -1}, "damping must be a number, 0 or more, got -1"),
        ({"order": "up"}, "order must be 'activation' or 'ascending', got 'up'"),
        ({"groups": "dynamic"}, "would not be neighbours"),
        ({"scales": octavo.SmoothQuant()}, r"not by SmoothQuant\(\)"),
    ):
        with pytest.raises(ValueError, match=text):
            GPTQ(**options)
    with pytest.raises(ValueError, match="GPTQ chooses codes, and HalfWeightOnly has none"):
        octavo.HalfWeightOnly(method=GPTQ())
    with pytest.raises(ValueError, match="GPTQ does not go with LLMInt8"):
        octavo.LLMInt8(method=GPTQ())


def test_a_layer_that_few_rows_reach_is_rounded_without_data_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 8))
    report = octavo.quantize_(model, octavo.Int4WeightOnly(method=GPTQ()), data=inputs(19))
    assert [row.reason for row in report.quantized] == [
        "rounded without data: 19 rows reached it, fewer than 80 / 4"
    ] * 2
