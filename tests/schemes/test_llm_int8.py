# SPDX-License-Identifier: Apache-2.0
"""LLM.int8(): an exact split of the columns, each part with its own error, and nothing to pay without outliers."""

import copy
import io

import pytest
import torch
from asserts import assert_bits_equal, assert_equal, assert_within
from torch import nn

import octavo
from octavo import ops
from octavo.nn import OutlierLinear
from octavo.nn.outlier import planes

N, K = 33, 70
COLUMNS = [4, 41, 69]


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N)


def data(columns: list[int] = COLUMNS, rows: int = 24) -> torch.Tensor:
    """Below 6 everywhere, but 20 and more in `columns`."""
    x = seeded(rows, K, seed=1).clamp(-5, 5)
    x[:, columns] = 20 + seeded(rows, len(columns), seed=2).abs()
    return x


def quantized(columns: list[int] = COLUMNS, scheme=octavo.LLMInt8()) -> OutlierLinear:
    layer = octavo.quantized(linear(), scheme, data=data(columns))
    assert layer.outlier_columns.tolist() == columns
    return layer


def without(x: torch.Tensor, columns: list[int]) -> torch.Tensor:
    x = x.clone()
    x[..., columns] = 0
    return x


# --- the numbers ----------------------------------------------------------------------------------------------------


def oracle(
    layer: nn.Linear, x: torch.Tensor, columns: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 8 of the paper in float64, without rounding anything to codes; and the largest error of its two parts.

    8 bits: half a step of 127 in each weight and each activation, |xw - x'w'| <= |x| dw + dx |w| + dx dw.
    16 bits: weights are within 1 / 64516 of the row's largest, activations within 1 / 65024; the latter counts twice,
    for x / 254 is rounded as well, and multiplies a low plane of up to 127 / 254 of the high one's step.
    """
    x, w = x.double(), layer.weight.detach().double()
    rest, outliers = without(x, columns), x - without(x, columns)
    w_rest, w_outliers = without(w, columns), w - without(w, columns)
    y = rest @ w_rest.T + outliers @ w_outliers.T + layer.bias.detach().double()

    def bound(x: torch.Tensor, w: torch.Tensor, dx: float, dw: float) -> torch.Tensor:
        dx_ik = (x.abs().amax(1, keepdim=True) * dx).expand_as(x)
        dw_jk = (w.abs().amax(1, keepdim=True) * dw).expand_as(w)
        return x.abs() @ dw_jk.T + dx_ik @ w.abs().T + dx_ik @ dw_jk.T

    in_use = w_outliers[:, columns]
    eight = bound(rest, w_rest, 1 / 254, 1 / 254)
    sixteen = bound(outliers[:, columns], in_use, 2 / 65024, 1 / 64516) if columns else torch.zeros_like(y)
    return y, eight, sixteen


@pytest.mark.parametrize("columns", [[], [5], COLUMNS, list(range(K))], ids=["none", "one", "three", "all"])
def test_both_parts_are_within_their_bounds(columns):
    """2^-12 is float32's share in the rounding to codes, 2^-18 that of the sums and the bias."""
    x = data(columns)
    y, eight, sixteen = oracle(linear(), x, columns)
    assert_within(quantized(columns)(x), y, (eight + sixteen) * (1 + 2**-12) + 2**-18)
    if len(columns) == K:
        assert not eight.any()


def test_the_part_in_8_bits_does_not_know_of_the_outliers():
    """The scale of a row is found after the outliers are set to zero: the rest has the bits of an Int8Dynamic layer."""
    layer, x = quantized(), data()
    plain = linear()
    plain.weight.data[:, COLUMNS] = 0
    rest = octavo.quantized(plain, octavo.Int8Dynamic())
    assert_equal(layer.codes(), rest.codes())
    assert_bits_equal(layer(without(x, COLUMNS)), rest(without(x, COLUMNS)))
    outliers = x[:, COLUMNS]
    sixteen = ops.linear_weight_only(torch.cat([outliers, outliers / 254], 1), *planes(layer.outlier_weight))
    assert_bits_equal(layer(x), rest(without(x, COLUMNS)) + sixteen)


def test_planes_hold_16_bits():
    """The low plane's half step is 1 / 508 of a step; 2^-18 is what float32 rounds in the rest, of 127 steps."""
    weight = seeded(40, 9) * torch.logspace(-6, 6, 40)[:, None]
    packed, _, scale = planes(weight)
    high, low = ops.unpack_weight(packed, 40, 18).double().split(9, dim=1)
    assert_within(scale * (high + low / 254), weight, scale.double() * (1 / 508 + 127 * 2**-22))


def test_without_outliers_it_is_the_dynamic_layer_and_calls_nothing_else(monkeypatch):
    x = seeded(5, K).clamp(-5, 5)
    layer, plain = (
        octavo.quantized(linear(), octavo.LLMInt8(), data=x),
        octavo.quantized(linear(), octavo.Int8Dynamic()),
    )
    monkeypatch.setattr(ops, "linear_weight_only", None)
    monkeypatch.setattr(OutlierLinear, "_both_parts", None)
    assert_bits_equal(layer(x), plain(x))
    assert octavo.compare(linear(), layer, x).bytes_after == octavo.compare(linear(), plain, x).bytes_after


def test_it_is_closer_than_int8_where_there_are_outliers():
    x = data()
    figures = {
        scheme.name: octavo.compare(linear(), octavo.quantized(linear(), scheme, data=x), x).output.sqnr_db
        for scheme in (octavo.Int8Dynamic(), octavo.LLMInt8())
    }
    assert figures["LLMInt8"] > figures["Int8Dynamic"] + 6


# --- which columns --------------------------------------------------------------------------------------------------


def test_a_column_is_an_outlier_if_calibration_has_seen_the_threshold_in_it():
    absmax = torch.tensor([0.0, 5.999, 6.0, 7.0, 100.0])
    assert octavo.LLMInt8().activations.find_outliers(absmax).tolist() == [False, False, True, True, True]
    assert octavo.LLMInt8(0.0).activations.find_outliers(absmax).tolist() == [False, True, True, True, True]
    relative = octavo.LLMInt8(10.0, relative=True).activations  # the median of those in use is 6
    assert relative.find_outliers(absmax).tolist() == [False, False, False, False, True]
    for unit in (1e-30, 1e30):
        assert_equal(relative.find_outliers(absmax * unit), relative.find_outliers(absmax))
    assert not relative.find_outliers(torch.zeros(3)).any()


def test_all_batches_count_wherever_the_outlier_is():
    x = seeded(30, K).clamp(-5, 5)
    x[29, 7], x[3, 8] = -6.0, torch.nan
    batches = [x[:3], x[3:4], torch.empty(0, K), x[4:]]  # the one with NaN is ignored
    layer = octavo.quantized(linear(), octavo.LLMInt8(), data=batches)
    assert layer.outlier_columns.tolist() == [7]


def test_an_outlier_that_calibration_has_not_seen_costs_its_row_precision_and_no_other():
    layer, x = quantized(), data()
    y = layer(x)
    x[2, 0] = 1000.0
    result = layer(x)
    assert_bits_equal(torch.cat([result[:2], result[3:]]), torch.cat([y[:2], y[3:]]))
    y, eight, sixteen = oracle(linear(), x, COLUMNS)
    assert_within(result, y, (eight + sixteen) * (1 + 2**-12) + 2**-18)


# --- what holds for every layer of the package, with outliers -------------------------------------------------------


def test_batch_threads_and_instruction_set_do_not_change_a_bit(isa):
    layer, x, threads = quantized(), data(rows=70), torch.get_num_threads()
    y = layer(x)
    for first, last in ((0, 1), (7, 8), (69, 70), (3, 20), (1, 70)):
        assert_bits_equal(layer(x[first:last]), y[first:last])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_bits_equal(layer(x), y)
    finally:
        torch.set_num_threads(threads)
    with octavo.use_isa("scalar"):
        assert_bits_equal(layer(x), y)


@pytest.mark.parametrize("column", [0, COLUMNS[0]], ids=["rest", "outliers"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_or_inf_makes_its_row_nan_and_touches_no_other(bad, column):
    layer, x = quantized(), data()
    y = layer(x)
    x[3, column] = bad
    result = layer(x)
    assert result[3].isnan().all()
    assert_bits_equal(torch.cat([result[:3], result[4:]]), torch.cat([y[:3], y[4:]]))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, list(range(K))], ids=["some", "all"])
def test_an_empty_batch_gives_an_empty_output(shape, columns):
    y = quantized(columns)(torch.empty(*shape, K, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((*shape, N), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_float32_result_rounded_once(dtype):
    layer, x = quantized(), data().to(dtype)
    assert_bits_equal(layer(x), layer(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert_bits_equal(layer(x.float()), layer(x))
    assert_bits_equal(layer.to(dtype).outlier_weight.detach(), quantized().outlier_weight.detach())


def test_gradients_reach_the_input_as_if_nothing_were_rounded():
    """But for rounding the low plane and the sums."""
    layer, x = quantized(), data().requires_grad_()
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand_as(x)
    bound = layer.outlier_weight.abs().amax(1).sum() / 64516 + N * 2**-23 * layer.dequantize().abs().sum(0)
    assert_within(x.grad, expected, bound.expand_as(x).detach())


# --- prepared, frozen, stored ---------------------------------------------------------------------------------------


def test_freezing_keeps_codes_columns_and_weights():
    prepared = octavo.LLMInt8().prepare_linear(linear())
    with pytest.raises(ValueError, match="not calibrated"):
        prepared(data())
    with octavo.calibrating(prepared):
        assert_bits_equal(prepared(data()), linear()(data()))
    layer = prepared.scheme.freeze(prepared)
    assert_equal(layer.codes(), prepared.quantized_weight.codes)
    assert_equal(layer.outlier_columns, torch.tensor(COLUMNS))
    assert_bits_equal(layer.outlier_weight.detach(), linear().weight.detach()[:, COLUMNS])
    assert_bits_equal(layer.dequantize()[:, COLUMNS], linear().weight.detach()[:, COLUMNS])
    _, _, sixteen = oracle(linear(), data(), COLUMNS)
    assert_within(layer(data()), prepared(data()), sixteen + K * 2**-23 * 25)  # sums of |x| <= 25, |w| < 1


def test_a_state_dict_brings_its_own_columns():
    source, other = quantized(), quantized([1])
    other.load_state_dict(copy.deepcopy(source.state_dict()))
    assert_bits_equal(other(data()), source(data()))
    none = quantized([])
    other.load_state_dict(none.state_dict())
    assert_bits_equal(other(data()), none(data()))


def test_a_refused_state_dict_leaves_the_layer_as_it_was():
    layer = quantized([1])
    before, state = layer(data()), quantized().state_dict()
    state["outlier_weight"] = state["outlier_weight"][:, :2]
    with pytest.raises(RuntimeError, match=r"outlier_weight has shape \(33, 2\)"):
        layer.load_state_dict(state)
    assert_bits_equal(layer(data()), before)


def test_files_hold_the_columns(tmp_path):
    source = nn.Sequential(quantized(), nn.ReLU())
    octavo.save(source, tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(K, N), nn.ReLU())
    loaded = octavo.load(tmp_path, skeleton)
    assert_bits_equal(loaded(data()), source(data()))
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    assert_bits_equal(torch.load(file, weights_only=False)(data()), source(data()))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: octavo.LLMInt8("6"), TypeError, "threshold must be a number, got '6'"),
        (lambda: octavo.LLMInt8(True), TypeError, "threshold must be a number"),
        (lambda: octavo.LLMInt8(-1.0), ValueError, "threshold must be finite and not negative, got -1.0"),
        (lambda: octavo.LLMInt8(float("nan")), ValueError, "threshold must be finite"),
        (lambda: octavo.LLMInt8(relative=1), TypeError, "relative must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- parity ---------------------------------------------------------------------------------------------------------


def test_parity_with_bitsandbytes():
    """Its weights are int8 in all columns, which where |x| is 20 costs up to half a step times that, and it computes in
    half precision: x, the weight, the sum of the outliers and the output are rounded by 2^-11 each."""
    bnb = pytest.importorskip("bitsandbytes")
    layer, x = linear(), data()
    theirs = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(layer.state_dict())
    with torch.no_grad():
        found = theirs.to("cpu")(x)
    _, eight, sixteen = oracle(layer, x, COLUMNS)
    weight = layer.weight.detach().double().abs()
    half_steps = x.double()[:, COLUMNS].abs().sum(1, keepdim=True) * weight.amax(1) / 254
    their_error = eight + half_steps + 4 * 2**-11 * (x.double().abs() @ weight.T)
    assert_within(found, quantized()(x), their_error + eight * (1 + 2**-12) + sixteen)
