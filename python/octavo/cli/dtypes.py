# SPDX-License-Identifier: Apache-2.0
"""`octavo dtypes [VALUE]`: the number formats compared, or how each of them stores one value."""

from __future__ import annotations

import argparse
import math
import re
import sys
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.dtypes import BitPattern, NumberFormat

from ._json import print_json

HELP = "compare number formats, or show how each of them stores a value"
_BITS_HEADER = ("format", "sign", "exponent", "fraction or integer", "stored", "error")
_SPARE = ("sign+exp+fraction", "least normal", "least > 0", "step at 1", "integers to")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "value", nargs="?", type=_number, help="a number, 1/3 for example; after -- if it is negative"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; Inf and NaN as strings")


def run(options: argparse.Namespace) -> None:
    from octavo.dtypes import FORMATS, table
    from octavo.dtypes.format_table import COLUMNS

    from ._tables import print_table

    if options.value is None:
        formats = table()
        if options.json:
            print_json(formats.to_dict())
        elif not sys.stdout.isatty():  # rich would cut the lines to 80 columns
            print(formats)
        else:
            print_table(COLUMNS, formats.rows, right=("bits", "digits", "7B, GB"), spare=_SPARE)
        return
    patterns = {format.name: _bits(options.value, format) for format in FORMATS.values()}
    if options.json:
        stored = [pattern.to_dict() for pattern in patterns.values() if pattern]
        print_json({"value": options.value, "formats": stored})
    elif not sys.stdout.isatty():
        print("\n".join(str(pattern) if pattern else f"{name:<10} -" for name, pattern in patterns.items()))
    else:
        print_table(_BITS_HEADER, [_row(*item) for item in patterns.items()])


def _number(text: str) -> float | int:
    """An integer, a float or a fraction. Raises: argparse.ArgumentTypeError, which argparse shows."""
    try:
        # A Fraction of 1e999999999 would have as many digits, so an exponent is left to float.
        value: Any = (
            Fraction(text) if re.fullmatch(r"[-+]?[0-9]{1,4000}(/[0-9]{1,4000})?", text) else float(text)
        )
        is_whole = math.isfinite(value) and value == int(value) and abs(value) < 2**63
        return int(value) if is_whole else float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _bits(value: float | int, format: NumberFormat) -> BitPattern | None:
    """The value in the format, at most its largest value; None for NaN if the format has none."""
    from octavo.dtypes import bits

    if math.isnan(value) and not format.has_nan:
        return None
    if isinstance(value, int) and not format.is_integer:
        value = float(value)
    return bits(value, format, saturate=not format.has_nan)


def _row(name: str, pattern: BitPattern | None) -> tuple[str, ...]:
    if pattern is None:
        return (name, "-", "-", "-", "no NaN", "-")
    error = "exact" if pattern.error == 0 else f"{pattern.error:+.3g}"
    return (name, pattern.sign, pattern.exponent, pattern.fraction, repr(pattern.stored), error)
