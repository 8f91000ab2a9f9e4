# SPDX-License-Identifier: Apache-2.0
"""Right where others are wrong: the behaviour table's rows, for every scheme on every instruction set of this CPU."""

import functools

import behaviour
import pytest
import torch
from asserts import assert_bits_equal, assert_equal, assert_within, in_case
from behaviour import (
    BAD_ROW,
    exact,
    layer_and_input,
    others,
    outlier_row,
    outlier_weight_row,
    random,
    replace_element,
    replace_row,
)
from models import bias_of, every_scheme, rounding_bound

import octavo

pytestmark = pytest.mark.usefixtures("isa")
SATURATION = {
    "same sign": behaviour.same_sign,
    "sign matched": behaviour.sign_matched,
    "k of 67,584": behaviour.big_k,
}


def quantized_case(scheme) -> tuple[octavo.nn.QuantLinear, torch.Tensor, torch.Tensor]:
    """A quantized layer, random activations, and what it makes of them; made once for each instruction set."""
    return _quantized_case(scheme, octavo.cpu_info().active)


@functools.cache
def _quantized_case(scheme, isa):
    layer, x = layer_and_input()
    fast = octavo.quantized(layer, scheme, data=x)
    return fast, x, fast(x)


@every_scheme
def test_largest_sums_do_not_saturate(scheme):
    """+1 and -1 are codes of every symmetric range: the sums are exact, only the two scales round."""
    for name, case in SATURATION.items():
        layer, x = case()
        fast = octavo.quantized(layer, scheme, data=x)
        y, expected = fast(x), exact(layer, x)
        with in_case(name):
            if (
                getattr(scheme, "symmetric", True) is False
            ):  # 255 steps from -1 to 1: both ends are half a step off
                assert_within(y, expected, rounding_bound(layer, fast, x))
            else:
                assert_within(y, expected, expected.abs() * 6 * 2**-24)


@every_scheme
def test_nan_or_inf_makes_its_row_nan_and_touches_no_other(scheme):
    fast, x, y = quantized_case(scheme)
    for bad in (torch.nan, torch.inf, -torch.inf):
        result = fast(replace_element(x, bad))
        with in_case(bad):
            assert result[BAD_ROW].isnan().all()
            assert_bits_equal(others(result), others(y))


@every_scheme
def test_a_row_of_zeros_or_denormals_gives_the_bias(scheme):
    fast, x, y = quantized_case(scheme)
    for tiny in (0.0, -0.0, 1e-40):
        result = fast(replace_row(x, tiny))
        with in_case(tiny):
            assert_bits_equal(result[BAD_ROW], bias_of(fast))
            assert_bits_equal(others(result), others(y))
            assert_bits_equal(fast(torch.full_like(x, tiny)), bias_of(fast).expand(16, 96))


@every_scheme
def test_an_outlier_row_touches_no_other_row(scheme):
    fast, x, y = quantized_case(scheme)
    result = fast(outlier_row(x))
    assert_bits_equal(others(result), others(y))
    layer, _ = layer_and_input()
    assert_within(result, exact(layer, outlier_row(x)), rounding_bound(layer, fast, outlier_row(x)))


@every_scheme
def test_an_outlier_weight_row_touches_no_other_output(scheme):
    """But for SmoothQuant, whose s sees all outputs."""
    _, x, y = quantized_case(scheme)
    heavy, _ = outlier_weight_row()
    result = octavo.quantized(heavy, scheme, data=x)(x)
    if not isinstance(scheme.method, octavo.SmoothQuant):
        assert_bits_equal(others(result.T), others(y.T))
    assert not torch.equal(result, y)


@every_scheme
def test_batch_and_threads_do_not_change_a_bit(scheme):
    layer, x = layer_and_input(n=200, k=300, m=70)
    fast = octavo.quantized(layer, scheme, data=x)
    y, threads = fast(x), torch.get_num_threads()
    for first, last in ((0, 1), (7, 8), (69, 70), (0, 16), (3, 20), (1, 70)):
        assert_bits_equal(fast(x[first:last]), y[first:last])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_bits_equal(fast(x), y)
    finally:
        torch.set_num_threads(threads)


@every_scheme
def test_odd_sizes_stay_within_the_bound(scheme):
    for m, n, k in [(5, 129, 383), (1, 1, 1), (3, 17, 65), (7, 15, 63), (13, 33, 3), (2, 16, 64)]:
        layer, x = layer_and_input(n, k, m)
        fast = octavo.quantized(layer, scheme, data=x)
        with in_case(m, n, k):
            assert_within(fast(x), exact(layer, x), rounding_bound(layer, fast, x))


@every_scheme
def test_an_empty_batch_gives_an_empty_output(scheme):
    fast, _, _ = quantized_case(scheme)
    for shape in [(0,), (0, 3), (3, 0)]:
        for dtype in (torch.float32, torch.bfloat16):
            y = fast(torch.empty(*shape, 512, dtype=dtype))
            assert (y.shape, y.dtype) == ((*shape, 96), dtype)


@every_scheme
def test_strides_and_leading_axes_do_not_matter(scheme):
    fast, x, y = quantized_case(scheme)
    wide = torch.full((16, 1024), torch.nan)
    wide[:, ::2] = x
    backing = torch.cat([random(1), x.reshape(-1)])
    misaligned = backing[1:].view(16, 512)
    views = {
        "transposed": x.T.contiguous().T,
        "every second column": wide[:, ::2],
        "not aligned": misaligned,
        "3-D": x.reshape(2, 8, 512),
        "4-D, permuted": x.reshape(4, 2, 2, 512).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    }
    for view in views.values():
        assert_bits_equal(fast(view).reshape(16, 96), y)
    assert_bits_equal(fast(x[0]), y[0])
    assert_bits_equal(fast(x[:1].expand(5, 512)), y[:1].expand(5, 96))


@every_scheme
def test_half_precision_gives_the_float32_result_rounded_once(scheme):
    fast, x, _ = quantized_case(scheme)
    for dtype in (torch.bfloat16, torch.float16):
        with in_case(dtype):
            assert_bits_equal(fast(x.to(dtype)), fast(x.to(dtype).float()).to(dtype))


@every_scheme
def test_the_input_is_not_written_to(scheme):
    fast, x, _ = quantized_case(scheme)
    before = x.clone()
    fast(x)
    assert_bits_equal(x, before)


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_element_of_a_weight_row_is_code_127_and_comes_back_within_one_rounding(sign):
    layer, _ = layer_and_input()
    rows = torch.arange(96)
    largest = layer.weight.abs().argmax(1)
    layer.weight[rows, largest] = sign * layer.weight[rows, largest].abs()
    fast = octavo.quantized(layer, octavo.Int8Dynamic())
    assert_equal(fast.codes()[rows, largest], torch.full((96,), 127 * sign, dtype=torch.int8))
    expected = layer.weight[rows, largest]
    assert_within(fast.dequantize()[rows, largest], expected, expected.abs() * 2**-23)


@every_scheme
def test_the_printed_table_says_the_same(scheme):
    row = behaviour.measure(scheme)
    assert {row["nan"], row["inf"]} == {"row:nan others:same bits"}
    assert {row[name] for name in ("outlier_row", "strided", "x3d")} == {"same bits"}
    assert row["outlier_wrow"] == (
        "changed" if isinstance(scheme.method, octavo.SmoothQuant) else "same bits"
    )
    assert {row[name] for name in ("sat_same", "sat_bigK")} == {"0"}
    if not getattr(scheme, "int32_bias", False):  # that rounds the bias
        assert {row[name] for name in ("zero_row", "all_zero")} == {"0"}
    assert (row["batch_invariant"], row["empty"]) == ("yes", "ok")
