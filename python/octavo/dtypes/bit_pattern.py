# SPDX-License-Identifier: Apache-2.0
"""One value in one format, bit by bit: as text, and in colours in a notebook.

The colours are the same as in most textbooks: sign red, exponent green, fraction blue.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .casts import FormatLike, decode, encode
from .formats import NumberFormat, find_format

_COLOURS = {"sign": "#f4b6b0", "exponent": "#b7e1b0", "fraction": "#b3d0f2", "value": "#b3d0f2"}


@dataclass(frozen=True)
class BitPattern:
    """What `bits` returns: `value` as given, `stored` as the format keeps it, and the bits.

    code      the bits as a number 0 .. 2^bits - 1
    error     stored - value, rounded once to a float; NaN if either is not finite and they differ
    """

    value: float | int
    format: NumberFormat
    code: int
    stored: float | int
    error: float

    @property
    def sign(self) -> str:
        """The sign bit as "0" or "1", empty if the format has none."""
        return self._binary[: self.format.sign_bits]

    @property
    def exponent(self) -> str:
        """The exponent's bits, empty for integers."""
        return self._binary[self.format.sign_bits : self.format.sign_bits + self.format.exponent_bits]

    @property
    def fraction(self) -> str:
        """The fraction's bits; for integers all bits after the sign."""
        return self._binary[self.format.sign_bits + self.format.exponent_bits :]

    @property
    def formula(self) -> str:
        """How the bits make the stored value."""
        if self.format.is_integer:
            return _integer_formula(self)
        return _float_formula(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain strings and numbers; NaN and Inf as float, which strict JSON cannot hold."""
        return {
            "format": self.format.name,
            "sign": self.sign,
            "exponent": self.exponent,
            "fraction": self.fraction,
            "hex": self._hex,
            "stored": self.stored,
            "error": self.error,
        }

    def __str__(self) -> str:
        fields = " ".join(part for part in (self.sign, self.exponent, self.fraction) if part)
        return f"{self.format.name:<10} {fields}   {self._hex}\n{self._lines(' ' * 11)}"

    def __repr__(self) -> str:
        return f"BitPattern({self.value!r} in {self.format.name}: {self._hex}, {self.stored!r})"

    def _repr_html_(self) -> str:
        parts = {"sign": self.sign, "exponent": self.exponent, "fraction": self.fraction}
        if self.format.is_integer:
            parts = {"sign": self.sign, "value": self.fraction}
        groups = "".join(_html_group(name, digits) for name, digits in parts.items() if digits)
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self._lines("").split("\n"))
        title = f"<b>{html.escape(self.format.name)}</b> <span style='opacity:.65;'>{self._hex}</span>"
        style = "font-family:monospace;font-size:13px;line-height:1.5;margin:6px 0;"
        row = "display:flex;flex-wrap:wrap;gap:4px 6px;margin:2px 0;"
        return f"<div style='{style}'>{title}<div style='{row}'>{groups}</div>{lines}</div>"

    @property
    def _binary(self) -> str:
        return f"{self.code:0{self.format.bits}b}"

    @property
    def _hex(self) -> str:
        return f"0x{self.code:0{-(-self.format.bits // 4)}X}"

    def _lines(self, indent: str) -> str:
        error = "exact" if self.error == 0 else f"error {self.error:+.3g}"
        if math.isnan(self.error):
            error = "beyond the range"
        return f"{indent}{self.formula} = {self.stored!r}\n{indent}given {self.value!r}, {error}"


def bits(value: float | torch.Tensor, format: FormatLike, *, saturate: bool = False) -> BitPattern:
    """How `value` is stored in `format`: print it, or show it in a notebook.

    value     a number, or a tensor with one element
    saturate  as `cast`: True makes a value beyond the range the largest one
    raises    ValueError for more than one element, an unknown format, and what the format cannot hold (300 in
              int8, NaN in e2m1) unless it saturates; TypeError for what is no number
    source    ours
    """
    format = find_format(format)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"bits: value has {value.numel()} elements, one is needed; see octavo.dtypes.encode"
            )
        value = value.item()
    codes = encode(value, format, saturate=saturate)
    stored = decode(codes, format).item()
    code = int(codes) % (1 << format.bits)
    return BitPattern(value, format, code, stored, _difference(stored, value))


def _difference(stored: float | int, value: float | int) -> float:
    if math.isfinite(stored) and math.isfinite(value):
        return float(Fraction(stored) - Fraction(value))
    same = stored == value or (math.isnan(stored) and math.isnan(value))
    return 0.0 if same else math.nan


def _float_formula(pattern: BitPattern) -> str:
    format, exponent = pattern.format, int(pattern.exponent, 2)
    fraction = int(pattern.fraction or "0", 2)
    sign = "-1" if pattern.sign == "1" else "+1"
    if not math.isfinite(pattern.stored):
        return "all exponent bits set" if format.has_inf else "all bits set"
    share = repr(fraction / (1 << format.fraction_bits))  # exact: fractions have at most 52 bits
    if exponent == 0:
        lead, power = "0", f"2^(1 - {format.bias})"  # subnormal, or zero
    else:
        lead, power = "1", f"2^({exponent} - {format.bias})"
    return f"{sign} * {power} * ({lead} + {share})"


def _integer_formula(pattern: BitPattern) -> str:
    magnitude = int(pattern.fraction, 2)
    if pattern.sign == "1":
        return f"-2^{pattern.format.bits - 1} + {magnitude}"
    return str(magnitude)


def _html_group(name: str, digits: str) -> str:
    box = f"background:{_COLOURS[name]};color:#111;padding:1px 3px;border:1px solid #8885;"
    boxes = "".join(f"<span style='{box}'>{digit}</span>" for digit in digits)
    return (
        "<span style='display:inline-block;text-align:center;'>"
        f"<span style='display:inline-flex;flex-wrap:wrap;'>{boxes}</span>"
        f"<span style='display:block;font-size:11px;opacity:.65;'>{name}, {len(digits)}</span></span>"
    )
