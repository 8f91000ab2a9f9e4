# SPDX-License-Identifier: Apache-2.0
"""`octavo demo`: a real encoder and a digit classifier, quantized and measured."""

from __future__ import annotations

import argparse
import sys

from ._types import positive_count

HELP = "quantize a sentence encoder and a digit classifier, measure both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="encoder's folder or hub name (default: the bundled all-MiniLM-L6-v2)"
    )
    parser.add_argument("--output", default="octavo-demo", help="folder for the plots (default: %(default)s)")
    parser.add_argument(
        "--threads", type=positive_count, default=1, help="torch threads (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    from octavo.huggingface.models import bundled_folder
    from octavo.lab.demo import run

    model = options.model or bundled_folder()  # before anything is promised: it may be missing
    print("Quantizing and measuring, about half a minute ...", file=sys.stderr, flush=True)
    print(run(model, options.output, threads=options.threads))
