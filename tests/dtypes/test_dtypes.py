# SPDX-License-Identifier: Apache-2.0
"""Number formats: every code of 16 bits and less against torch and against exact fractions, and every rounding rule."""

import math
from bisect import bisect_left
from fractions import Fraction

import pytest
import torch
from asserts import assert_bits_equal, assert_equal

from octavo.dtypes import FORMATS, NumberFormat, bits, cast, decode, encode, find_format

FLOATS = [format for format in FORMATS.values() if not format.is_integer]
INTEGERS = [format for format in FORMATS.values() if format.is_integer]
SHORT = [format for format in FORMATS.values() if format.bits <= 16]
SAME_WIDTH = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

names = {"ids": lambda format: format.name}


def all_codes(format: NumberFormat) -> torch.Tensor:
    return torch.arange(1 << format.bits)


def exact_value(code: int, format: NumberFormat) -> Fraction | None:
    """What a float's code means, by the definition and in whole numbers; None for Inf and NaN."""
    sign, magnitude = divmod(code, 1 << (format.bits - 1))
    exponent, fraction = divmod(magnitude, 1 << format.fraction_bits)
    all_ones = (1 << format.exponent_bits) - 1
    if (format.has_inf and exponent == all_ones) or (
        format.has_nan and not format.has_inf and magnitude == (1 << (format.bits - 1)) - 1
    ):
        return None
    significand = Fraction(fraction, 1 << format.fraction_bits) + (exponent > 0)
    return (-1) ** sign * significand * Fraction(2) ** (max(exponent, 1) - format.bias)


def nearest_code(x: Fraction, format: NumberFormat) -> int:
    """The code of the value nearest to x >= 0, ties to the even code; x is within the range."""
    codes = range(format.largest_code + 1)
    above = bisect_left(codes, x, key=lambda code: exact_value(code, format))
    if above == 0:
        return 0
    below = above - 1
    from_below, from_above = x - exact_value(below, format), exact_value(above, format) - x
    if from_below == from_above:
        return above if above % 2 == 0 else below
    return below if from_below < from_above else above


# --- against torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [f for f in SHORT if f.dtype is not None], **names)
def test_every_code_means_what_it_means_in_torch(format):
    codes = all_codes(format)
    stored = codes.to(torch.uint8) if format.bits == 8 else codes.to(torch.int16)
    expected = stored.view(format.dtype)
    if format.is_integer:
        assert_equal(decode(codes, format), expected.long())
    else:
        assert_bits_equal(decode(codes, format), expected.double())


def float32_patterns(count: int) -> torch.Tensor:
    """Random bits read as float32: all exponents, subnormals, Inf and NaN."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2", "fp8_e4m3fn"])
def test_float32_are_cast_as_torch_does(name):
    format, x = FORMATS[name], float32_patterns(300_000)
    if name == "fp8_e4m3fn":  # beyond 464, torch's versions differ: NaN until 2.11, 448 since
        x = x[~(x.abs() > 464)]
    assert_bits_equal(cast(x, format), x.to(format.dtype).float())


def test_float64_are_cast_to_float32_as_torch_does():
    generator = torch.Generator().manual_seed(1)
    fractions = 1 + torch.rand(300_000, generator=generator, dtype=torch.float64)
    x = fractions * 2.0 ** torch.randint(-152, 129, (300_000,), generator=generator).double()
    assert_bits_equal(cast(x, "fp32"), x.float().double())


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def test_wide_floats_have_the_bits_they_have_in_memory(name):
    format = FORMATS[name]
    x = float32_patterns(10_000)
    x = x[~x.isnan()].to(format.dtype)
    stored = x.view(SAME_WIDTH[format.bits]).long()
    codes = stored if format.bits == 64 else stored & 0xFFFFFFFF
    assert_equal(encode(x, format), codes)
    assert_bits_equal(decode(codes, format), x.double())


@pytest.mark.parametrize("format", [f for f in FLOATS if f.dtype is not None], **names)
def test_the_figures_are_those_of_torch_finfo(format):
    info = torch.finfo(format.dtype)
    figures = (format.bits, format.max, format.min, format.smallest_normal, format.epsilon)
    assert figures == (info.bits, info.max, info.min, info.tiny, info.eps)
    smallest = torch.ones((), dtype=SAME_WIDTH[format.bits]).view(format.dtype)
    assert format.smallest_subnormal == smallest.double().item()


@pytest.mark.parametrize("format", [f for f in INTEGERS if f.dtype is not None], **names)
def test_the_ranges_are_those_of_torch_iinfo(format):
    info = torch.iinfo(format.dtype)
    assert (format.bits, format.min, format.max) == (info.bits, info.min, info.max)


# --- against exact fractions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [f for f in FLOATS if f.bits <= 8], **names)
def test_every_code_has_its_exact_value(format):
    values = decode(all_codes(format), format).tolist()
    for code, value in enumerate(values):
        exact = exact_value(code, format)
        assert (not math.isfinite(value)) if exact is None else Fraction(value) == exact


def test_e2m1_is_the_16_values_of_its_specification():
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.tensor(positive + [-value for value in positive], dtype=torch.float64)
    assert_bits_equal(decode(torch.arange(16), "fp4_e2m1"), expected)


@pytest.mark.parametrize("format", SHORT, **names)
def test_a_value_of_the_format_keeps_its_code(format):
    codes = all_codes(format)
    values = decode(codes, format)
    kept = ~values.isnan()
    assert_equal(encode(values[kept], format), codes[kept])


@pytest.mark.parametrize("format", [f for f in FLOATS if f.bits <= 8], **names)
def test_midpoints_and_their_neighbours_go_where_exact_fractions_say(format):
    values = [exact_value(code, format) for code in range(format.largest_code + 1)]
    for below, above in zip(values[:-1], values[1:], strict=True):
        middle = float((below + above) / 2)  # exact: one bit more than the format's
        for x in (math.nextafter(middle, 0.0), middle, math.nextafter(middle, math.inf)):
            expected = nearest_code(Fraction(x), format)
            assert int(encode(x, format)) == expected
            assert int(encode(-x, format)) == expected + (1 << (format.bits - 1))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_every_midpoint_of_16_bits_goes_to_the_even_code(name):
    format = FORMATS[name]
    below = torch.arange(format.largest_code)
    middle = (decode(below, format) + decode(below + 1, format)) / 2
    infinity = torch.tensor(math.inf, dtype=torch.float64)
    assert_equal(encode(middle, format), below + below % 2)
    assert_equal(encode(torch.nextafter(middle, -infinity), format), below)
    assert_equal(encode(torch.nextafter(middle, infinity), format), below + 1)


def test_float64_is_rounded_once():
    """1 + 2^-8 is a tie of bf16 and 2^-40 decides it; through float32, where 2^-40 is lost, it would go down."""
    x = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)
    assert cast(x, "bf16").item() == 1 + 2**-7
    assert cast(x.float(), "bf16").item() == 1.0


@pytest.mark.parametrize("format", [f for f in FLOATS if f.bits < 64], **names)
def test_halfway_beyond_the_largest_value_is_where_overflow_begins(format):
    """IEEE 754, section 4.3.1: overflow is what an unbounded exponent would round beyond the largest value."""
    exponent = math.frexp(format.max)[1] - 1
    step = 2.0 ** (exponent - format.fraction_bits)
    limit = format.max + step / 2
    inside = math.nextafter(limit, 0.0)
    tie_is_inside = format.largest_code % 2 == 0
    assert cast(inside, format).item() == format.max
    for x in (limit, math.nextafter(limit, math.inf), math.inf):
        for sign in (1, -1):
            assert cast(sign * x, format, saturate=True).item() == sign * format.max
            if x == limit and tie_is_inside:
                assert cast(sign * x, format).item() == sign * format.max
            elif format.has_inf:
                assert cast(sign * x, format).item() == sign * math.inf
            elif format.has_nan:
                assert cast(sign * x, format).isnan()
            else:
                with pytest.raises(ValueError, match="1 of 1 values lie outside fp4_e2m1"):
                    cast(sign * x, format)


# --- NaN and integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("format", [f for f in FLOATS if f.has_nan], **names)
def test_nan_stays_nan(format, saturate):
    assert cast(torch.tensor([math.nan, 1.0]), format, saturate=saturate).isnan().tolist() == [True, False]


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if not f.has_nan], **names)
def test_formats_without_nan_refuse_it_unless_told_what_it_becomes(format):
    x = torch.tensor([math.nan, 1.0])
    with pytest.raises(ValueError, match=f"x holds NaN, which {format.name} does not have"):
        cast(x, format, saturate=True)
    assert cast(x, format, nan=2.0).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("format", INTEGERS, **names)
def test_floats_become_integers_by_rounding_half_to_even_within_the_range(format):
    x = [0.5, 1.5, 2.5, 2.4999, 6.5] + ([-0.5, -1.5, -2.5, -7.5] if format.sign_bits else [])
    assert cast(torch.tensor(x), format).tolist() == [float(round(value)) for value in x]


@pytest.mark.parametrize("format", INTEGERS, **names)
def test_floats_beyond_the_range_of_an_integer_are_refused_or_saturate(format):
    over, under = float(format.max) + 1.0, float(format.min) - max(1.0, float(format.max) * 2**-52)
    x = torch.tensor([math.inf, over, -math.inf, under, 1.0], dtype=torch.float64)
    for value in x[:4]:
        with pytest.raises(ValueError, match=f"1 of 1 values lie outside {format.name}.*saturate=True"):
            encode(value, format)
    codes = encode(x, format, saturate=True)
    assert decode(codes, format).tolist() == [format.max, format.max, format.min, format.min, 1]


def test_whole_numbers_are_never_rounded_on_the_way_to_an_integer():
    x = torch.tensor([2**63 - 1, -(2**63), 2**53 + 1])
    assert_equal(decode(encode(x, "int64"), "int64"), x)
    assert_equal(decode(encode(x, "int32", saturate=True), "int32"), x.clamp(-(2**31), 2**31 - 1))
    with pytest.raises(ValueError, match=r"beyond 2\^53"):
        encode(x, "bf16")


@pytest.mark.parametrize("format", FLOATS, **names)
def test_exact_integers_end_where_it_says(format):
    first_lost = format.exact_integers + 1
    x = torch.arange(max(0, first_lost - 100), first_lost, dtype=torch.int64)
    assert_equal(cast(x, format).long(), x)
    if first_lost <= format.max and format.bits < 64:
        assert cast(first_lost, format).item() != first_lost


# --- results, arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, name, expected",
    [
        (torch.float32, "bf16", torch.float32),
        (torch.bfloat16, "fp8_e4m3fn", torch.bfloat16),
        (torch.bfloat16, "fp16", torch.float32),  # bf16 has 8 digits, fp16 has 11
        (torch.float16, "bf16", torch.float32),  # and 65,504 is not far
        (torch.float16, "int8", torch.float16),
        (torch.float32, "int32", torch.float64),
        (torch.float32, "fp64", torch.float64),
        (torch.int8, "fp16", torch.float32),
    ],
)
def test_the_result_has_a_dtype_that_holds_the_format(dtype, name, expected):
    x = torch.tensor([[1, 2], [3, 0]]).to(dtype)
    result = cast(x, name)
    assert result.dtype == expected and result.tolist() == x.tolist()


@pytest.mark.parametrize("inner", SHORT, **names)
@pytest.mark.parametrize("outer", FORMATS.values(), **names)
def test_holds_is_true_when_casting_changes_nothing(outer, inner):
    values = decode(all_codes(inner), inner).double()
    values = values[values.isfinite()]
    kept = torch.equal(cast(values, outer, saturate=True).double(), values)
    signed_zero = inner.sign_bits == 1 and not inner.is_integer
    assert outer.holds(inner) == (kept and not (outer.is_integer and signed_zero))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)])
def test_shapes_stay(shape):
    x = torch.ones(shape)
    assert cast(x, "bf16").shape == encode(x, "int4").shape == x.shape


@pytest.mark.parametrize(
    "given, name",
    [
        ("bfloat16", "bf16"),
        ("BF16", "bf16"),
        (torch.bfloat16, "bf16"),
        ("torch.float8_e4m3fn", "fp8_e4m3fn"),
        ("e2m1", "fp4_e2m1"),
        (torch.int8, "int8"),
        (FORMATS["int4"], "int4"),
    ],
)
def test_a_format_goes_by_many_names(given, name):
    assert find_format(given) is FORMATS[name]


def test_a_mistyped_format_gets_the_list_and_a_guess():
    with pytest.raises(ValueError, match="no format 'blfoat16', there are fp64, .*did you mean 'bfloat16'"):
        bits(1.0, "blfoat16")
    with pytest.raises(ValueError, match="no format 'torch.complex64'"):
        cast(1.0, torch.complex64)
    with pytest.raises(TypeError, match="format is int"):
        cast(1.0, 16)


@pytest.mark.parametrize("x", ["1", None, torch.ones(2, dtype=torch.complex64), [1.0]])
def test_what_is_no_number_is_refused(x):
    with pytest.raises(TypeError, match="a real number or tensor is needed"):
        cast(x, "bf16")


def test_codes_out_of_range_are_refused():
    for codes in (torch.tensor([256]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="codes of fp8_e5m2 are 0 .. 255"):
            decode(codes, "fp8_e5m2")
    with pytest.raises(TypeError, match="must be an integer tensor"):
        decode(torch.ones(2), "fp8_e5m2")


def test_a_format_of_ones_own_works_and_a_wrong_one_is_refused():
    e3m2 = NumberFormat("fp6_e3m2", 6, exponent_bits=3, fraction_bits=2, bias=3)  # OCP Microscaling, 5.3.2
    assert (e3m2.max, e3m2.smallest_normal, e3m2.smallest_subnormal) == (28.0, 0.25, 0.0625)
    for code, value in enumerate(decode(all_codes(e3m2), e3m2).tolist()):
        assert Fraction(value) == exact_value(code, e3m2)
    for wrong in (
        {"bits": 8, "exponent_bits": 4, "fraction_bits": 4, "bias": 7},
        {"bits": 16, "exponent_bits": 10, "fraction_bits": 5, "bias": 511},
        {"bits": 8, "exponent_bits": 4, "fraction_bits": 3, "bias": 0},
        {"bits": 8, "exponent_bits": 4, "fraction_bits": 3, "bias": 7, "has_inf": True},
        {"bits": 8, "fraction_bits": 3},
        {"bits": 65},
    ):
        with pytest.raises(ValueError, match="NumberFormat x: "):
            NumberFormat("x", **wrong)
