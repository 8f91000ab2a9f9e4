# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: reference/ against exact rational arithmetic, against float64, and against the operators."""

from fractions import Fraction

import pytest
import strategies
import torch
from asserts import assert_bits_equal, assert_equal, assert_within
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import ops, reference

small_floats = st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60)


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest to `value`, ties to even, by exact integer arithmetic; |value| must stay below 2^127."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, -126) - 23)
    nearest = float(round(magnitude / step) * step)  # Fraction rounds half to even
    return nearest if value > 0 else -nearest


@given(small_floats, small_floats, small_floats)
def test_fma_rounds_once(a, b, c):
    result = reference.codes.fma(*map(torch.tensor, (a, b, c))).item()
    assert result == round_to_float32(Fraction(a) * Fraction(b) + Fraction(c))


def test_fma_is_right_where_float64_then_float32_rounds_twice():
    """a b is a hair below half a step of c. float64 loses the hair, and the tie then goes up to the even neighbour."""
    a, b, c = map(torch.tensor, (1 + 2**-23, (1 - 2**-23) * 2**-24, 1 + 2**-23))
    assert (a.double() * b.double() + c.double()).float().item() == 1 + 2**-22
    assert reference.codes.fma(a, b, c).item() == 1 + 2**-23


def test_fma_passes_inf_and_nan_on():
    result = reference.codes.fma(
        torch.tensor([torch.inf, torch.nan, 3e38, 1.0]),
        torch.tensor([1.0, 1.0, 3e38, 1.0]),
        torch.tensor([1.0, 1.0, 1.0, -torch.inf]),
    )
    assert_bits_equal(result, torch.tensor([torch.inf, torch.nan, torch.inf, -torch.inf]))


def layer(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """codes [n, k], weight_scale [n, 1], bias [n]; the codes hold both extremes, and the foreign -128."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    if codes.numel() > 1:
        codes.view(-1)[0], codes.view(-1)[-1] = -128, 127
    scale = torch.rand(n, 1, generator=generator) / 50 + 1e-3
    return codes, scale, torch.randn(n, generator=generator).to(dtype)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


LINEARS = {
    "linear_dynamic": lambda module, x, packed, *rest: module.linear_dynamic(x, packed, *rest, True),
    "linear_dynamic_affine": lambda module, x, packed, *rest: module.linear_dynamic(x, packed, *rest, False),
    "linear_weight_only": lambda module, x, packed, *rest: module.linear_weight_only(x, packed, *rest),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES)
@pytest.mark.parametrize("shape", [(5, 70), (2, 3, 7), (65,), (0, 4), (2, 0), (1, 1)], ids=str)
def test_linear_operators_equal_the_reference(isa, name, dtype, shape):
    codes, scale, bias = layer(33, shape[-1], dtype)
    packed, column_sum = reference.pack_weight(codes)
    for some_bias in (bias, None):
        arguments = (activations(*shape, dtype=dtype), packed, column_sum, scale, some_bias)
        assert_bits_equal(LINEARS[name](ops, *arguments), LINEARS[name](reference, *arguments))


@pytest.mark.parametrize("name", LINEARS)
def test_linear_is_within_the_rounding_of_its_activations(name):
    """|y - exact| <= step / 2 * sum_k |w|: a row is rounded to a step of its own, and all else is nearly exact."""
    codes, scale, bias = layer(24, 130)
    weight, x = codes.double() * scale.double(), activations(9, 130)
    y = LINEARS[name](reference, x, *reference.pack_weight(codes), scale, bias)
    exact = x.double() @ weight.T + bias.double()
    absmax, width = x.abs().amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    step = {
        "linear_dynamic": absmax / 127,
        "linear_dynamic_affine": width / 255,
        "linear_weight_only": absmax / 32512,
    }[name].double()
    if name == "linear_dynamic_affine":
        step = 2 * step  # the rounded zero_point may push one end half a step out of range
    products = x.double().abs() @ weight.abs().T + bias.double().abs()
    assert_within(y, exact, step / 2 * weight.abs().sum(1) + 8 * torch.finfo(torch.float32).eps * products)


@pytest.mark.parametrize("name", LINEARS)
def test_linear_is_exact_on_values_that_are_codes(name):
    """Whole numbers with a 127 in every row have scale 1 (or 1/256): nothing is rounded anywhere."""
    codes, _, _ = layer(20, 77)
    x = torch.randint(-127, 128, (6, 77), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0], x[:, 1] = 127, -128 if name == "linear_dynamic_affine" else -127
    packed, column_sum = reference.pack_weight(codes)
    y = LINEARS[name](reference, x, packed, column_sum, torch.ones(20, 1), None)
    assert_equal(y.long(), x.long() @ codes.long().T)


def test_int8_mm_equals_the_operator_and_numpy_int64(isa):
    generator = torch.Generator().manual_seed(0)
    for dtype, low, high in ((torch.int8, -128, 128), (torch.uint8, 0, 256)):
        a = torch.randint(low, high, (7, 131), dtype=dtype, generator=generator)
        b = torch.randint(-128, 128, (131, 19), dtype=torch.int8, generator=generator)
        a[0], b[:, 0] = low, -128  # the largest sums of all
        expected = torch.from_numpy(a.long().numpy() @ b.long().numpy()).to(torch.int32)
        assert_equal(reference.int8_mm(a, b), expected)
        assert_equal(ops.int8_mm(a, b), expected)


@given(st.integers(0, 40), st.integers(0, 140))
def test_unpack_inverts_pack_and_column_sums_add_up(n, k):
    codes, _, _ = layer(n, k)
    packed, column_sum = reference.pack_weight(codes)
    assert packed.shape == (-(-n // 16), -(-k // 64), 16, 64)
    assert_equal(reference.unpack_weight(packed, n, k), codes)
    assert_equal(column_sum.long(), codes.long().sum(1))
    assert int(packed.count_nonzero()) == int(codes.count_nonzero())  # all padding is zero


def test_packed_layout_byte_by_byte():
    """code [row, k] lies in strip row / 16, tile k / 64, line (k mod 64) / 4, byte 4 (row mod 16) + k mod 4."""
    codes, _, _ = layer(35, 150)
    packed, _ = reference.pack_weight(codes)
    for row in (0, 1, 15, 16, 34):
        for k in (0, 3, 4, 63, 64, 149):
            assert packed[row // 16, k // 64, k % 64 // 4, 4 * (row % 16) + k % 4] == codes[row, k]


@given(st.data())
def test_quantizers_equal_the_operators(data):
    shape = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 40)))
    x = data.draw(strategies.tensors(shape=shape))
    qmin, qmax, symmetric = data.draw(
        st.sampled_from(
            [
                (-127, 127, True),
                (1, 255, True),
                (-128, 127, False),
                (0, 255, False),
                (-8, 7, False),
                (0, 15, False),
            ]
        )
    )
    dtype = torch.int8 if qmin < 0 else torch.uint8
    scale, zero_point = ops.choose_qparams(x, qmin, qmax, symmetric)
    expected_scale, expected_zero_point = reference.choose_qparams(x, qmin, qmax, symmetric)
    assert_bits_equal(scale, expected_scale)
    assert_equal(zero_point, expected_zero_point)
    codes = ops.quantize(x, scale, zero_point, qmin, qmax, dtype)
    assert_equal(codes, reference.quantize(x, scale, zero_point, qmin, qmax, dtype))
    for real in strategies.FLOAT_TYPES:
        assert_bits_equal(
            ops.dequantize(codes, scale, zero_point, real),
            reference.dequantize(codes, scale, zero_point, real),
        )


def test_quantize_rounds_ties_to_even_saturates_and_maps_nan_to_zero_point(isa):
    x = torch.tensor(
        [[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 126.6, -0.0]]
    )
    arguments = (x, torch.ones(1), torch.tensor([0], dtype=torch.int32), -127, 127, torch.int8)
    expected = torch.tensor([[0, 2, 2, 0, -2, 127, -127, 127, -127, 0, 127, 0]], dtype=torch.int8)
    assert_equal(reference.quantize(*arguments), expected)
    assert_equal(ops.quantize(*arguments), expected)


def test_reference_errors_name_the_row_and_the_remedy():
    with pytest.raises(ValueError, match="row 1 of x holds NaN or Inf"):
        reference.choose_qparams(torch.tensor([[1.0], [torch.inf]]), -127, 127, True)
    with pytest.raises(ValueError, match="qmin \\+ qmax even"):
        reference.choose_qparams(torch.ones(1, 1), -128, 127, True)
    with pytest.raises(ValueError, match="65793"):
        reference.int8_mm(torch.zeros(1, 65794, dtype=torch.int8), torch.zeros(65794, 1, dtype=torch.int8))
    assert octavo.reference is reference
