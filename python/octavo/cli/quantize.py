# SPDX-License-Identifier: Apache-2.0
"""`octavo quantize MODEL OUTPUT`: one transformers folder into another, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..schemes import SCHEMES
from ._types import size

HELP = "quantize a transformers model folder into another one"

BY_NAME = {  # one file, one scheme; those that calibrate need the model and data, which the Python functions take
    scheme.__module__.rpartition(".")[2]: scheme for scheme in SCHEMES.values() if not scheme.needs_data
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("output", type=Path, help="new or empty folder")
    parser.add_argument(
        "--scheme", choices=sorted(BY_NAME), default="int8_dynamic", help="default: %(default)s"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="layers to keep float, such as lm_head"
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default="4GB",
        help="largest weight file, such as 500MB; default: %(default)s",
    )


def run(options: argparse.Namespace) -> None:
    from ..stream import quantize_folder

    report = quantize_folder(
        options.model_folder,
        options.output,
        BY_NAME[options.scheme],
        exclude=options.exclude,
        shard_size=options.shard_size,
        progress=True,
    )
    print(report)
    print(f"saved: {options.output}")
