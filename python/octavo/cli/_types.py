# SPDX-License-Identifier: Apache-2.0
"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
import re


def positive(text: str) -> int:
    """A whole number above 0. Raises: argparse.ArgumentTypeError, which argparse shows beside the option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def size(text: str) -> int:
    """Bytes: a number above 0 and KB, MB, GB, in thousands as on disks, or nothing. Raises: as `positive`."""
    found = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one such as 500MB")
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]
