# SPDX-License-Identifier: Apache-2.0
"""`octavo dtypes [VALUE]`: the number formats compared, or how each of them stores one value."""

from __future__ import annotations

import argparse
import math
import sys
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..dtypes import BitPattern, NumberFormat

HELP = "compare number formats, or show how each of them stores a value"
_BITS_HEADER = ("format", "sign", "exponent", "fraction or integer", "stored", "error")
_SPARE = ("sign+exp+fraction", "least normal", "least > 0", "step at 1", "integers to")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "value", nargs="?", type=_number, help="a number, 1/3 for example; after -- if it is negative"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; Inf and NaN as strings")


def run(options: argparse.Namespace) -> None:
    import json

    from ..dtypes import FORMATS, table
    from ..dtypes.format_table import HEADER
    from ._tables import print_table

    if options.value is None:
        formats = table()
        if options.json:
            print(json.dumps(formats.to_dict(), indent=2))
        elif not sys.stdout.isatty():  # rich would cut the lines to 80 columns
            print(formats)
        else:
            print_table(HEADER, formats.rows, right=("bits", "digits", "7B, GB"), spare=_SPARE)
        return
    patterns = {format.name: _bits(options.value, format) for format in FORMATS.values()}
    if options.json:
        stored = [_plain(pattern) for pattern in patterns.values() if pattern]
        print(json.dumps({"value": _finite(options.value), "formats": stored}, indent=2))
    elif not sys.stdout.isatty():
        print("\n".join(str(pattern) if pattern else f"{name:<10} -" for name, pattern in patterns.items()))
    else:
        print_table(_BITS_HEADER, [_row(*item) for item in patterns.items()])


def _number(text: str) -> float | int:
    """An integer, a float or a fraction. Raises: argparse.ArgumentTypeError, which argparse shows."""
    try:
        value = Fraction(text)
        return int(value) if value.denominator == 1 and abs(value) < 2**63 else float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    try:
        return float(text)  # inf, nan
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _bits(value: float | int, format: NumberFormat) -> BitPattern | None:
    """What the format makes of the value: its largest one if need be, None for NaN where there is none."""
    from ..dtypes import bits

    if math.isnan(value) and not format.has_nan:
        return None
    if isinstance(value, int) and not format.is_integer:
        value = float(value)
    return bits(value, format, saturate=not format.has_nan)


def _plain(pattern: BitPattern) -> dict[str, Any]:
    return {key: _finite(value) for key, value in pattern.to_dict().items()}


def _finite(value: Any) -> Any:
    """Strict JSON has no Inf and NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(name: str, pattern: BitPattern | None) -> tuple[str, ...]:
    if pattern is None:
        return (name, "-", "-", "-", "no NaN", "-")
    error = "exact" if pattern.error == 0 else f"{pattern.error:+.3g}"
    return (name, pattern.sign, pattern.exponent, pattern.fraction, repr(pattern.stored), error)
