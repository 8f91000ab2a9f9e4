# SPDX-License-Identifier: Apache-2.0
"""Values to bits and back, for every format: one rounding to nearest, ties to even, and no surprise at the ends.

The codes of positive floats are in the order of their values. So the code of a rounded value is its fraction as a
whole number, plus the exponent in the bits above; where rounding carries, the carry lands in the exponent by itself,
and where it goes past the largest code the value has overflowed.
"""

from __future__ import annotations

import numbers

import torch

from .formats import FORMATS, NumberFormat, find_format

FormatLike = str | torch.dtype | NumberFormat
_ACCEPTED = {format.dtype for format in FORMATS.values()} - {None} | {torch.bool}


def cast(
    x: torch.Tensor | float, format: FormatLike, *, saturate: bool = False, nan: float | None = None
) -> torch.Tensor:
    """`x` rounded to the values of `format`, as floats: what remains of x once it was stored in it ("fake cast").

    x         a real tensor of any shape, or a number
    saturate  True: values beyond the range, Inf included, become the largest or lowest value. False: they become
              what the format has for them: Inf, else NaN (e4m3fn), else (integers, e2m1) they are refused
    nan       what NaN becomes in formats without NaN; None refuses them. NaN stays NaN in the others
    returns   x's shape, in x's dtype if that holds every value of the format, else in float32 or float64. (float64
              does not hold every int64: those are rounded to it once more)
    raises    TypeError for complex and other unreal input; ValueError for what is refused, and an unknown format
    source    IEEE 754-2019, sections 4.3.1 and 7.4; docs/numerics.md, eq. 29
    """
    format, x = find_format(format), _as_tensor("cast", x)
    values = decode(encode(x, format, saturate=saturate, nan=nan), format)
    return values.to(_result_dtype(x.dtype, format))


def encode(
    x: torch.Tensor | float, format: FormatLike, *, saturate: bool = False, nan: float | None = None
) -> torch.Tensor:
    """The bits of every element of `x` in `format`, rounded to nearest, ties to even.

    Arguments and errors as `cast`.
    returns  int64, x's shape: the bits read as a number 0 .. 2^bits - 1, for 64-bit formats as a signed one
    """
    format, x = find_format(format), _as_tensor("encode", x)
    is_nan = x.isnan()
    if not format.has_nan and is_nan.any():
        if nan is None:
            raise ValueError(
                f"encode: x holds NaN, which {format.name} does not have; say what it becomes, nan=0.0 for example"
            )
        x = x.masked_fill(is_nan, nan)
    if format.is_integer:
        return _encode_integer(x, format, saturate)
    return _encode_float(_as_float64(x, format), format, saturate)


def decode(codes: torch.Tensor, format: FormatLike) -> torch.Tensor:
    """The values that `encode`'s bits stand for.

    codes    integers of any dtype and shape, 0 .. 2^bits - 1 (for 64-bit formats, any int64)
    returns  float64 for floats, int64 for integers; exact
    raises   TypeError for what is not an integer tensor; ValueError for codes out of range, and an unknown format
    source   IEEE 754-2019, section 3.4; docs/numerics.md, eq. 28
    """
    format = find_format(format)
    if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.is_complex():
        raise TypeError("decode: codes must be an integer tensor, as octavo.dtypes.encode returns it")
    codes = codes.long()
    if format.bits < 64 and ((codes < 0) | (codes >= 1 << format.bits)).any():
        raise ValueError(f"decode: codes of {format.name} are 0 .. {(1 << format.bits) - 1}")
    if not format.is_integer:
        return _decode_float(codes, format)
    if format.sign_bits and format.bits < 64:
        return codes - ((codes >> (format.bits - 1)) << format.bits)
    return codes


def _encode_integer(x: torch.Tensor, format: NumberFormat, saturate: bool) -> torch.Tensor:
    # Compared as floats against max + 1, which is a power of two: 2^63 - 1 is not a float64.
    rounded = torch.round(x.double()) if x.is_floating_point() else x.long()
    above = rounded >= float(format.max + 1) if x.is_floating_point() else rounded > format.max
    below = rounded < format.min
    _refuse_overflow(above | below, format, saturate)
    integers = rounded.masked_fill(above | below, 0).long()
    integers = integers.masked_fill(above, format.max).masked_fill(below, format.min)
    return integers if format.bits == 64 else integers & ((1 << format.bits) - 1)


def _encode_float(x: torch.Tensor, format: NumberFormat, saturate: bool) -> torch.Tensor:
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    magnitude = finite.view(torch.int64) if format == FORMATS["fp64"] else _nearest_code(finite, format)
    above = x.isinf() | (magnitude > format.largest_code)
    quiet_nan = (1 << (format.bits - 1)) - 1  # all ones, the only NaN of e4m3fn
    if format.has_inf:
        quiet_nan = format.largest_code + 1 | 1 << (format.fraction_bits - 1)
    if saturate:
        magnitude = magnitude.masked_fill(above, format.largest_code)
    else:
        _refuse_overflow(above, format, saturate=format.has_nan)
        magnitude = magnitude.masked_fill(above, format.largest_code + 1)  # Inf, or e4m3fn's NaN
    magnitude = magnitude.masked_fill(x.isnan(), quiet_nan)
    return magnitude | (torch.signbit(x).long() << (format.bits - 1))


def _nearest_code(x: torch.Tensor, format: NumberFormat) -> torch.Tensor:
    """The code of x, finite, >= 0 and float64, as if the exponent could be as large as it likes."""
    exponent = torch.frexp(x).exponent.long() - 1  # x = 2^exponent * 1.something
    # Zero and subnormals have the step of the smallest normals.
    exponent = torch.where(x == 0, 1 - format.bias, exponent.clamp(min=1 - format.bias))
    steps = torch.round(x * _power_of_two(format.fraction_bits - exponent))  # the product is exact
    return steps.long() + ((exponent + format.bias - 1) << format.fraction_bits)


def _decode_float(codes: torch.Tensor, format: NumberFormat) -> torch.Tensor:
    if format == FORMATS["fp64"]:
        return codes.view(torch.float64)
    magnitude = codes & ((1 << (format.bits - 1)) - 1)
    exponent, fraction = magnitude >> format.fraction_bits, magnitude & ((1 << format.fraction_bits) - 1)
    steps = torch.where(exponent == 0, fraction, fraction + (1 << format.fraction_bits))
    values = steps.double() * _power_of_two(exponent.clamp(min=1) - format.bias - format.fraction_bits)
    beyond = magnitude > format.largest_code
    values = values.masked_fill(beyond, torch.nan)
    if format.has_inf:
        values = values.masked_fill(magnitude == format.largest_code + 1, torch.inf)
    negative = codes >> (format.bits - 1) == 1
    return torch.where(negative, -values, values)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent for -1022 .. 1023, exact; torch.pow and torch.ldexp do not promise that."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _refuse_overflow(outside: torch.Tensor, format: NumberFormat, saturate: bool) -> None:
    if not saturate and outside.any():
        raise ValueError(
            f"encode: {int(outside.sum())} of {outside.numel()} values lie outside {format.name}, "
            f"{format.min} .. {format.max}, which has no Inf; use saturate=True"
        )


def _as_tensor(who: str, x: torch.Tensor | float) -> torch.Tensor:
    if isinstance(x, numbers.Real):
        try:
            whole = isinstance(x, numbers.Integral)
            return torch.tensor(int(x) if whole else float(x), dtype=torch.int64 if whole else torch.float64)
        except (OverflowError, RuntimeError):
            raise ValueError(f"{who}: {x} is beyond int64; give it as a float") from None
    if not isinstance(x, torch.Tensor) or x.dtype not in _ACCEPTED:
        found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{who}: x is {found}; a real number or tensor is needed, x.float() makes one")
    return x.detach()


def _as_float64(x: torch.Tensor, format: NumberFormat) -> torch.Tensor:
    values = x.double()
    # A long that float64 rounds would be rounded twice.
    if x.dtype == torch.int64 and (values.abs() > 2.0**53).any():
        raise ValueError(
            f"encode: x holds int64 beyond 2^53, which float64 rounds; use x.double() for {format.name}"
        )
    return values


def _result_dtype(dtype: torch.dtype, format: NumberFormat) -> torch.dtype:
    if dtype.is_floating_point and find_format(dtype).holds(format):
        return dtype
    return torch.float32 if FORMATS["fp32"].holds(format) else torch.float64
