# SPDX-License-Identifier: Apache-2.0
"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number above 0. Raises: argparse.ArgumentTypeError, which argparse shows beside the option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
