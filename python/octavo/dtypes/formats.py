# SPDX-License-Identifier: Apache-2.0
"""The number formats: a few integers describe each one, and everything else follows from them.

A float is a sign, an exponent and a fraction (docs/numerics.md, eq. 28). What the largest exponent means is where
formats differ: IEEE 754 keeps it for Inf and NaN, e4m3fn only its last code for NaN, e2m1 none of it.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NumberFormat:
    """One number format. Integers have no exponent: exponent_bits, fraction_bits and bias are 0.

    name             as in FORMATS
    bits             in all; sign_bits is 1 or 0
    bias             what is subtracted from the stored exponent
    has_inf, has_nan   whether some codes mean Inf, NaN
    Raises: ValueError if the parts do not make a format.
    Source: IEEE 754-2019, section 3.4; fp8: Micikevicius et al. 2022 (arXiv:2209.05433), table 1; fp4: OCP
    Microscaling Formats 1.0, section 5.3.3.
    """

    name: str
    bits: int
    sign_bits: int = 1
    exponent_bits: int = 0
    fraction_bits: int = 0
    bias: int = 0
    has_inf: bool = False
    has_nan: bool = False

    def __post_init__(self):
        problem = self._problem()
        if problem:
            raise ValueError(f"NumberFormat {self.name}: {problem}")

    def _problem(self) -> str:
        if self.sign_bits not in (0, 1) or not 2 <= self.bits <= 64:
            return f"bits is {self.bits} and sign_bits {self.sign_bits}, needed are 2 .. 64 and 0 or 1"
        if self.is_integer:
            parts = self.fraction_bits or self.bias or self.has_inf or self.has_nan
            return "an integer has no fraction, bias, Inf or NaN" if parts else ""
        if self.sign_bits + self.exponent_bits + self.fraction_bits != self.bits or not self.sign_bits:
            return f"1 sign bit, exponent_bits and fraction_bits have to add up to {self.bits} bits"
        within_fp64 = self.exponent_bits <= 8 and 0 < self.bias < 1 << self.exponent_bits
        if not within_fp64 and (self.exponent_bits, self.fraction_bits, self.bias) != (11, 52, 1023):
            return "needs at most 8 exponent bits and a bias below 2^exponent_bits; fp64 is the one exception"
        if self.has_inf and not (self.has_nan and self.fraction_bits):
            return "Inf goes with NaN, and the two need a fraction bit to differ"
        return ""

    @property
    def is_integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def largest_code(self) -> int:
        """The bits of `max`, as a number."""
        if self.is_integer:
            return (1 << (self.bits - self.sign_bits)) - 1
        infinity = ((1 << self.exponent_bits) - 1) << self.fraction_bits
        if self.has_inf:
            return infinity - 1
        return (1 << (self.bits - 1)) - (2 if self.has_nan else 1)

    @property
    def max(self) -> float | int:
        """The largest finite value."""
        if self.is_integer:
            return self.largest_code
        exponent, fraction = divmod(self.largest_code, 1 << self.fraction_bits)
        return math.ldexp((1 << self.fraction_bits) + fraction, exponent - self.bias - self.fraction_bits)

    @property
    def min(self) -> float | int:
        """The lowest finite value: -max for floats, -max - 1 or 0 for integers."""
        if self.is_integer:
            return -self.max - 1 if self.sign_bits else 0
        return -self.max

    @property
    def smallest_normal(self) -> float | int:
        """The smallest value above 0 with all digits of the format; 1 for integers."""
        return 1 if self.is_integer else math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float | int:
        """The smallest value above 0; 1 for integers."""
        return 1 if self.is_integer else math.ldexp(1.0, 1 - self.bias - self.fraction_bits)

    @property
    def epsilon(self) -> float | int:
        """The distance from 1 to the next larger value."""
        return 1 if self.is_integer else math.ldexp(1.0, -self.fraction_bits)

    @property
    def decimal_digits(self) -> float:
        """Significant decimal digits: log10 of 2^(fraction_bits + 1), for integers of 2^(bits - sign_bits)."""
        digits = self.bits - self.sign_bits if self.is_integer else self.fraction_bits + 1
        return digits * math.log10(2)

    @property
    def exact_integers(self) -> int:
        """All integers from 0 to this one are values of the format; the next one is not."""
        return self.largest_code if self.is_integer else 1 << (self.fraction_bits + 1)

    @property
    def dtype(self) -> torch.dtype | None:
        """torch's dtype whose elements are single values of this format, None if it has none."""
        return _DTYPES.get(self.name)

    def holds(self, other: NumberFormat) -> bool:
        """Whether every finite value of `other`, with its sign, is a value of this format."""
        if self.is_integer:
            return other.is_integer and self.min <= other.min and other.max <= self.max
        digits = other.bits - other.sign_bits if other.is_integer else other.fraction_bits + 1
        lowest_step = other.smallest_subnormal >= self.smallest_subnormal
        return digits <= self.fraction_bits + 1 and lowest_step and other.max <= self.max


def find_format(format: str | torch.dtype | NumberFormat) -> NumberFormat:
    """The format with a name ("bf16", "bfloat16", "fp8_e4m3fn", "int4", ...), of a torch dtype, or itself.

    Raises: ValueError, listing the names, for another name or dtype; TypeError for anything else.
    Source: ours.
    """
    if isinstance(format, NumberFormat):
        return format
    if not isinstance(format, str | torch.dtype):
        raise TypeError(
            f"find_format: format is {type(format).__name__}, accepted are a name, a torch.dtype and a NumberFormat"
        )
    name = str(format).removeprefix("torch.").lower()
    name = _ALIASES.get(name, name)
    if name not in FORMATS:
        similar = difflib.get_close_matches(name, [*FORMATS, *_ALIASES], n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise ValueError(f"find_format: no format {str(format)!r}, there are {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def _ieee(name: str, bits: int, exponent_bits: int) -> NumberFormat:
    """A format of the IEEE 754 kind, in which the largest exponent means Inf and NaN."""
    bias = (1 << (exponent_bits - 1)) - 1
    return NumberFormat(name, bits, 1, exponent_bits, bits - 1 - exponent_bits, bias, True, True)


FORMATS: dict[str, NumberFormat] = {
    format.name: format
    for format in (
        _ieee("fp64", 64, 11),
        _ieee("fp32", 32, 8),
        _ieee("fp16", 16, 5),
        _ieee("bf16", 16, 8),
        _ieee("fp8_e5m2", 8, 5),
        NumberFormat("fp8_e4m3fn", 8, 1, 4, 3, 7, has_nan=True),
        NumberFormat("fp4_e2m1", 4, 1, 2, 1, 1),
        NumberFormat("int64", 64),
        NumberFormat("int32", 32),
        NumberFormat("int16", 16),
        NumberFormat("int8", 8),
        NumberFormat("uint8", 8, sign_bits=0),
        NumberFormat("int4", 4),
        NumberFormat("uint4", 4, sign_bits=0),
    )
}
_ALIASES = {
    "float64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float8_e5m2": "fp8_e5m2",
    "e5m2": "fp8_e5m2",
    "float8_e4m3fn": "fp8_e4m3fn",
    "e4m3fn": "fp8_e4m3fn",
    "float4_e2m1fn_x2": "fp4_e2m1",
    "e2m1": "fp4_e2m1",
}
_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
