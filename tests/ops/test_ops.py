# SPDX-License-Identifier: Apache-2.0
"""The operators' values equal octavo.reference's bit for bit, on every ISA, with any threads; bad input is named."""

import itertools

import pytest
import torch
from asserts import in_case
from operator_arguments import FLOATS, RANGES, assert_same_bits, make_weight, random_codes, random_rows

import octavo
from octavo import ops, reference

# --- values ---------------------------------------------------------------------------------------------------------


def test_quantize_is_the_references(isa):
    for case in itertools.product(FLOATS, RANGES, [(3, 1), (9, 77), (1, 100_000)]):
        with in_case(*case):
            check_quantize(*case)


def check_quantize(dtype, kind, shape):
    codes_dtype, symmetric = kind
    x, (qmin, qmax) = random_rows(*shape, dtype), RANGES[codes_dtype, symmetric]
    scale, zero_point = ops.choose_qparams(x, qmin, qmax, symmetric)
    expected_scale, expected_zero_point = reference.choose_qparams(x, qmin, qmax, symmetric)
    assert_same_bits(scale, expected_scale)
    assert_same_bits(zero_point, expected_zero_point)

    codes = ops.quantize(x, scale, zero_point, qmin, qmax, codes_dtype)
    assert_same_bits(codes, reference.quantize(x, scale, zero_point, qmin, qmax, codes_dtype))
    for out in FLOATS:
        real = ops.dequantize(codes, scale, zero_point, out)
        assert_same_bits(real, reference.dequantize(codes, scale, zero_point, out))


def test_quantize_saturates_and_maps_nan_to_the_zero_point(isa):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, 2.5, 3.5]])
    codes = ops.quantize(x, torch.ones(1), torch.full((1,), 7, dtype=torch.int32), -128, 127, torch.int8)
    assert codes.tolist() == [[7, 127, -128, 127, -128, 7, 9, 11]]  # ties go to the even step: 2 and 4


@pytest.mark.parametrize("a_dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 17, 65), (33, 100, 130), (3, 5, 0), (0, 5, 3)])
def test_int8_mm_is_exact_for_any_strides(isa, a_dtype, m, n, k):
    a, b = random_codes(m, k, dtype=a_dtype), random_codes(k, n)
    expected = (a.long() @ b.long()).int()
    assert_same_bits(ops.int8_mm(a, b), expected)
    assert_same_bits(ops.int8_mm(a.t().contiguous().t(), b.t().contiguous().t()), expected)
    assert_same_bits(ops.int8_mm(random_codes(m, 2 * k, dtype=a_dtype)[:, ::2].copy_(a), b), expected)


def test_int8_mm_holds_the_largest_sum_that_int32_can(isa):
    k = reference.MAX_EXACT_K
    a, b = torch.full((1, k), 255, dtype=torch.uint8), torch.full((k, 1), -128, dtype=torch.int8)
    assert ops.int8_mm(a, b).item() == -255 * 128 * k
    with pytest.raises(ValueError, match=f"k is {k + 1}"):
        ops.int8_mm(torch.ones(1, k + 1, dtype=torch.int8), torch.ones(k + 1, 1, dtype=torch.int8))


@pytest.mark.parametrize("n, k", [(1, 1), (16, 64), (17, 65), (40, 3), (5, 0)])
def test_packing_is_the_references_and_loses_nothing(n, k):
    for codes in (random_codes(n, k), random_codes(k, n).t(), random_codes(2 * n, k)[::2]):
        packed, column_sum = ops.pack_weight(codes)
        expected_packed, expected_column_sum = reference.pack_weight(codes)
        assert_same_bits(packed, expected_packed)
        into = torch.empty_like(packed)
        assert_same_bits(ops.pack_weight_into(codes, into), column_sum)
        assert_same_bits(into, packed)
        assert_same_bits(column_sum, expected_column_sum)
        assert_same_bits(ops.unpack_weight(packed, n, k), codes.contiguous())


def heavy_tailed_codes(n, k):
    """Codes of which few neighbours add up to more than 128, -128 among them."""
    codes = torch.randint(-64, 65, (n, k), dtype=torch.int8)
    for sign in (127, -128):
        codes.view(-1)[torch.randint(0, max(codes.numel(), 1), (codes.numel() // 1500,))] = sign
    return codes


@pytest.mark.parametrize("n, k", [(1, 1), (17, 65), (40, 700), (64, 1536), (5, 0), (3, 16385)])
def test_saturating_words_are_listed_for_avx2(isa, n, k):
    packed, column_sum = ops.pack_weight(heavy_tailed_codes(n, k))
    expected = reference.list_saturating(packed, column_sum)
    is_listed = isa == "avx2" and k <= 16384
    assert_same_bits(ops.list_saturating(packed, column_sum), expected if is_listed else column_sum)
    packed, column_sum = ops.pack_weight(random_codes(n, k))
    if n * k > 1000:  # too many of them
        assert_same_bits(ops.list_saturating(packed, column_sum), column_sum)


@pytest.mark.parametrize("m, n, k", [(1, 17, 65), (7, 40, 700), (13, 64, 1536)])
def test_a_list_of_saturating_words_changes_no_bit(isa, linear, m, n, k):
    """Rows of the largest activations, at which every listed word saturates, are among them."""
    packed, column_sum = ops.pack_weight(heavy_tailed_codes(n, k))
    listed = reference.list_saturating(packed, column_sum)
    assert len(listed) > len(column_sum)
    x = random_rows(m, k)
    x[0], x[-1] = 7.0, -x[-1]
    rest = torch.rand(n, 1) / 100, torch.randn(n)
    assert_same_bits(linear(x, packed, listed, *rest), linear(x, packed, column_sum, *rest))
    assert_same_bits(linear(x, packed, listed, *rest), linear(x, packed, listed, *rest, module=reference))


def test_values_behind_the_column_sums_must_be_a_list():
    """Else a kernel would follow offsets into memory that is not the list's."""
    packed, column_sum = ops.pack_weight(heavy_tailed_codes(40, 700))
    listed = reference.list_saturating(packed, column_sum)
    for changes in ({40: 1}, {41: 10**6}, {42: -1}, {43: int(listed[43]) + 2}, {}):
        wrong = listed.clone() if changes else listed[:-1]
        for at, value in changes.items():
            wrong[at] = value
        with pytest.raises(
            ValueError, match="linear_dynamic: column_sum: the .* behind the sums of 40 columns"
        ):
            ops.linear_dynamic(torch.randn(2, 700), packed, wrong, torch.rand(40, 1))


def test_linear_is_the_references(isa, linear):
    sizes = [(1, 64, 64), (2, 1, 1), (13, 33, 67), (40, 100, 130), (4, 5, 0), (0, 5, 3)]
    for dtype, (m, n, k) in itertools.product(FLOATS, sizes):
        x = random_rows(m, k, dtype) if m and k else torch.zeros(m, k, dtype=dtype)
        for bias_dtype in (None, torch.float32, dtype):
            with in_case(dtype, (m, n, k), bias_dtype):
                weight = make_weight(n, k, bias_dtype)
                assert_same_bits(linear(x, *weight), linear(x, *weight, module=reference))


def test_linear_keeps_non_finite_rows_to_themselves(isa, linear):
    x, weight = torch.randn(6, 70), make_weight(20, 70)
    clean = linear(x, *weight)
    x[1, 3], x[4, 69] = torch.nan, -torch.inf
    y = linear(x, *weight)
    assert y[[1, 4]].isnan().all()
    assert_same_bits(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_linear_takes_any_shape_and_any_strides(isa, linear):
    weight, x = make_weight(20, 70), torch.randn(2, 3, 70)
    y = linear(x, *weight)
    assert y.shape == (2, 3, 20) and y.is_contiguous()
    assert_same_bits(linear(x[1, 2], *weight), y[1, 2])
    assert_same_bits(linear(x.transpose(0, 1), *weight), y.transpose(0, 1).contiguous())
    assert_same_bits(linear(x[..., None].expand(2, 3, 70, 2)[..., 1], *weight), y)


def test_linear_reads_a_packed_weight_at_any_address(isa, linear):
    packed, *rest = make_weight(20, 70)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.int8)[1:].view(packed.shape).copy_(packed)
    x = torch.randn(3, 70)
    assert_same_bits(linear(x, shifted, *rest), linear(x, packed, *rest))


@pytest.mark.parametrize("m", [5, 300])
def test_batch_split_and_threads_change_no_bit(isa, linear, m):
    x, weight = torch.randn(m, 200), make_weight(600, 200)
    whole = linear(x, *weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(linear(x, *weight), whole)
            assert_same_bits(torch.cat([linear(part, *weight) for part in x.split([2, m - 2])]), whole)
    finally:
        torch.set_num_threads(before)


def room_for_bias(k):
    """How large an int32 bias may be, so that no sum with it leaves int32."""
    return 2**31 - 1 - 255 * 128 * k


def with_int32_bias(n, k, bias):
    packed, column_sum, weight_scale, _ = make_weight(n, k)
    return packed, column_sum, weight_scale, bias.to(torch.int32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, n, k", [(1, 64, 64), (13, 33, 67), (300, 600, 130), (4, 5, 0), (0, 5, 3)])
def test_an_int32_bias_is_part_of_the_exact_sum(isa, dtype, m, n, k):
    """Of any size that leaves sums within int32: a float bias would be rounded together with the sum's float32."""
    x, options = torch.randn(m, k).to(dtype), (torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32))
    sizes = torch.logspace(0, 1, n, base=room_for_bias(k), dtype=torch.float64)
    weight = with_int32_bias(n, k, (sizes * (torch.rand(n) * 2 - 1)).round())
    y = ops.linear_static(x, *weight, *options)
    assert_same_bits(y, reference.linear_static(x, *weight, *options))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for part, expected in zip(
                x.split([m // 3, m - m // 3]), y.split([m // 3, m - m // 3]), strict=True
            ):
                assert_same_bits(ops.linear_static(part, *weight, *options), expected)
    finally:
        torch.set_num_threads(before)


def test_the_largest_int32_bias_reaches_the_end_of_int32(isa):
    """x - zero_point = 255 and weights -128 with the least bias sum up to -2^31 + 1, as a float32 -2^31."""
    packed, column_sum = ops.pack_weight(torch.full((1, 70), -128, dtype=torch.int8))
    one, end = torch.ones(1), torch.tensor([-128], dtype=torch.int32)
    bias = torch.tensor([-room_for_bias(70)], dtype=torch.int32)
    y = ops.linear_static(torch.full((1, 70), 255.0), packed, column_sum, one[None], bias, one, end)
    assert y.item() == -(2.0**31)


@pytest.mark.parametrize("too_large", [room_for_bias(70) + 1, -room_for_bias(70) - 1, -(2**31)])
def test_an_int32_bias_with_which_sums_could_leave_int32_is_refused(too_large):
    weight = with_int32_bias(2, 70, torch.tensor([0, too_large]))
    message = (
        f"int32 bias is {abs(too_large)}, .* k = 70 leave room for {room_for_bias(70)}; use a float bias"
    )
    with pytest.raises(ValueError, match=message):
        ops.linear_static(torch.zeros(1, 70), *weight, SCALE[:1], ZERO[:1])


def test_only_static_layers_take_an_int32_bias():
    weight = with_int32_bias(2, 70, torch.zeros(2))
    for operator in (ops.linear_dynamic, ops.linear_weight_only):
        with pytest.raises(ValueError, match="bias must be float32, bfloat16 or float16"):
            operator(torch.zeros(1, 70), *weight)


# --- bad input ------------------------------------------------------------------------------------------------------

X, SCALE, ZERO = torch.randn(3, 5), torch.ones(3), torch.zeros(3, dtype=torch.int32)
CODES, NAN_IN_ROW_1 = torch.zeros(3, 5, dtype=torch.int8), torch.tensor([[0.0], [torch.nan]])


def static(input_scale, input_zero_point):
    return ops.linear_static(torch.randn(2, 70), *make_weight(20, 70), input_scale, input_zero_point)


@pytest.mark.parametrize(
    "error, text, call",
    [
        (TypeError, "x is float64", lambda: ops.choose_qparams(X.double(), -127, 127, True)),
        (TypeError, "x is a list", lambda: ops.choose_qparams([1.0], -127, 127, True)),
        (ValueError, "2 dimensions", lambda: ops.choose_qparams(X[0], -127, 127, True)),
        (ValueError, "qmin \\+ qmax even", lambda: ops.choose_qparams(X, -128, 127, True)),
        (ValueError, "qmin < qmax", lambda: ops.choose_qparams(X, 5, 5, False)),
        (ValueError, "row 1", lambda: ops.choose_qparams(NAN_IN_ROW_1, -127, 127, True)),
        (ValueError, "row 0", lambda: ops.choose_qparams(torch.tensor([[torch.inf]]), -127, 127, False)),
        (TypeError, "dtype is int32", lambda: ops.quantize(X, SCALE, ZERO, -127, 127, torch.int32)),
        (ValueError, "0 <= qmin", lambda: ops.quantize(X, SCALE, ZERO, -127, 127, torch.uint8)),
        (ValueError, "scale must be float32", lambda: ops.quantize(X, ZERO, ZERO, 0, 7, torch.int8)),
        (
            ValueError,
            "scale .* one value for each",
            lambda: ops.quantize(X, SCALE[:2], ZERO, 0, 7, torch.int8),
        ),
        (ValueError, "zero_point must be int32", lambda: ops.quantize(X, SCALE, SCALE, 0, 7, torch.int8)),
        (TypeError, "codes is float32", lambda: ops.dequantize(X, SCALE, ZERO)),
        (TypeError, "dtype is float64", lambda: ops.dequantize(CODES, SCALE, ZERO, torch.float64)),
        (TypeError, "b is uint8", lambda: ops.int8_mm(CODES, CODES.t().to(torch.uint8))),
        (ValueError, "a has 5 columns, b has 3 rows", lambda: ops.int8_mm(CODES, CODES)),
        (ValueError, "2 dimensions", lambda: ops.int8_mm(CODES, CODES[0])),
        (TypeError, "codes is float32", lambda: ops.pack_weight(X)),
        (ValueError, "2 dimensions", lambda: ops.pack_weight(CODES[0])),
        (ValueError, "does not hold", lambda: ops.pack_weight_into(CODES, CODES)),
        (ValueError, "does not hold", lambda: ops.unpack_weight(ops.pack_weight(CODES)[0], 17, 5)),
        (ValueError, "input_scale must be float32", lambda: static(SCALE, ZERO[:1])),
        (ValueError, "positive", lambda: static(torch.zeros(1), ZERO[:1])),
        (ValueError, "input_zero_point must be int32", lambda: static(SCALE[:1], SCALE[:1])),
        (ValueError, "-128 .. 127, is 128", lambda: static(SCALE[:1], ZERO[:1] + 128)),
        (ValueError, "negative", lambda: ops.unpack_weight(ops.pack_weight(CODES)[0], -1, 5)),
    ],
)
def test_bad_input_is_named(error, text, call):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    "error, text, change",
    [
        (TypeError, "x is float64", {"x": torch.randn(2, 70).double()}),
        (TypeError, "x is int8", {"x": random_codes(2, 70)}),
        (TypeError, "x is a list", {"x": [1.0] * 70}),
        (ValueError, "at least 1 dimension", {"x": torch.tensor(1.0)}),
        (ValueError, "x has 7 features", {"x": torch.randn(2, 7)}),
        (ValueError, "packed", {"packed": torch.zeros(2, 2, 16, 64)}),
        (ValueError, "packed", {"packed": random_codes(1, 2, 16, 64)}),
        (ValueError, "column_sum", {"column_sum": torch.zeros(19, dtype=torch.int32)}),
        (ValueError, "weight_scale", {"weight_scale": torch.ones(20)}),
        (ValueError, "weight_scale", {"weight_scale": torch.ones(20, 1).double()}),
        (ValueError, "bias must have 20 values", {"bias": torch.zeros(19)}),
        (ValueError, "bias must be float32", {"bias": torch.zeros(20).double()}),
    ],
)
def test_bad_input_to_linear_is_named(linear, error, text, change):
    names = ("x", "packed", "column_sum", "weight_scale", "bias")
    arguments = dict(zip(names, (torch.randn(2, 70), *make_weight(20, 70)), strict=True))
    with pytest.raises(error, match=text):
        linear(*(arguments | change).values())


def test_a_meta_tensor_gives_a_meta_result(linear):
    arguments = torch.randn(3, 70), *make_weight(20, 70), *linear.options
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    assert linear.op(*on_meta).shape == (3, 20)


def test_use_isa_reaches_the_operators(linear):
    weight, x = make_weight(20, 70), torch.randn(3, 70)
    default = linear(x, *weight)
    with octavo.use_isa("scalar"):
        assert_same_bits(linear(x, *weight), default)
