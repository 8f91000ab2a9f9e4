# SPDX-License-Identifier: Apache-2.0
"""`octavo quantize MODEL OUTPUT`: one transformers folder into another, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._types import scheme_called, scheme_name, size

HELP = "quantize a transformers model folder into another one"
DEFAULT = "int8-dynamic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("output", type=Path, help="new or empty folder")
    parser.add_argument(
        "--scheme",
        type=_without_data,
        metavar="NAME",
        help=f"such as int8-weight-only or int8-dynamic:symmetric=false; default: {DEFAULT}",
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="layers to keep float, such as lm_head"
    )
    parser.add_argument(
        "--include-embeddings",
        nargs="*",
        metavar="PATTERN",
        help="quantize embeddings as well, and heads that are tied to them; patterns say which",
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default="4GB",
        help="largest weight file, such as 500MB; default: %(default)s",
    )


def run(options: argparse.Namespace) -> None:
    from octavo.conversion.folder import quantize_folder

    report = quantize_folder(
        options.model_folder,
        options.output,
        options.scheme or scheme_called(DEFAULT),
        exclude=options.exclude,
        include_embeddings=_embeddings(options.include_embeddings),
        shard_size=options.shard_size,
        progress=True,
    )
    print(report)
    print(f"saved: {options.output}")
    print(f"load it in Python: import octavo; model = octavo.load({str(options.output)!r})")


def _embeddings(patterns: list[str] | None) -> Any:
    """False without the flag, True with nothing behind it, and the patterns otherwise."""
    return False if patterns is None else patterns or True


def _without_data(text: str) -> Any:
    """The scheme that `text` names. Those that calibrate need the model and data, which the Python functions take."""
    scheme_name(text.partition(":")[0])  # before torch is imported
    from octavo.schemes import by_name

    try:
        scheme = by_name(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if scheme.needs_data:
        raise argparse.ArgumentTypeError(
            f"{text} needs data to calibrate: octavo.quantize_(model, scheme, data=batches) in Python takes it"
        )
    return scheme
