# SPDX-License-Identifier: Apache-2.0
"""`octavo inspect CHECKPOINT`: what a saved model holds, layer by layer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "what is in a checkpoint, per layer, with sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="folder of octavo.save or of transformers, or a safetensors file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    import json

    from octavo.files import HEADER, inspect_checkpoint

    from ._tables import print_table

    contents = inspect_checkpoint(options.checkpoint)
    if options.json:
        print(json.dumps(contents.to_dict(), indent=2))
    elif not sys.stdout.isatty():  # rich would cut the lines to 80 columns
        print(contents)
    else:
        print_table(HEADER, contents.rows, right=("bytes", "bits per weight"), spare=("kind",))
        print(contents.summary)
