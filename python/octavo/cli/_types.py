# SPDX-License-Identifier: Apache-2.0
"""Kinds of arguments that several commands take, and the names of schemes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def positive_count(text: str) -> int:
    """A whole number above 0. Raises: argparse.ArgumentTypeError, which argparse shows beside the option."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number of at most 9 digits")
    return int(text)


def temperature(text: str) -> float:
    """A number from 0 on. Raises: as `positive_count`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on; 0 takes the likeliest token")
    return value


def size(text: str) -> int:
    """Bytes: a number above 0, perhaps with KB, MB or GB, which are powers of 1000. Raises: as `positive_count`."""
    found = re.fullmatch(r"([0-9]{1,15})(KB|MB|GB|)", text.upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one such as 500MB")
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def scheme_names() -> list[str]:
    """Names of the schemes, each from the name of the scheme's file. Nothing is imported: that would bring torch."""
    folder = Path(__file__).parent.parent / "schemes"
    names = (path.stem for path in folder.glob("*.py"))
    return sorted(name.replace("_", "-") for name in names if name != "base" and not name.startswith("_"))


def scheme_name(text: str) -> str:
    """`text` as `scheme_names` has it: case and underscores do not matter. Raises: as `positive_count`."""
    spelled = {name.replace("-", ""): name for name in scheme_names()}
    name = spelled.get(text.lower().replace("-", "").replace("_", ""))
    if name is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(scheme_names())}")
    return name


def scheme_called(name: str) -> Any:
    """The class of the scheme `name`."""
    from octavo.schemes import by_name

    return type(by_name(name))
