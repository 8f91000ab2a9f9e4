# SPDX-License-Identifier: Apache-2.0
"""`octavo inspect CHECKPOINT`: what a saved model holds, layer by layer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

LONGEST = 80  # of a value of the metadata
HELP = "what is in a checkpoint, per layer, with sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder of octavo.save or of transformers, a safetensors file or a GGUF file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    import json

    from octavo.files import HEADER, inspect_checkpoint

    from ._tables import print_table

    contents = inspect_checkpoint(options.checkpoint)
    if options.json:
        print(json.dumps(contents.to_dict(), indent=2))
        return
    if contents.metadata:
        _print_metadata(contents.metadata)
    if not sys.stdout.isatty():  # rich would cut the lines to 80 columns
        print(contents)
    else:
        print_table(HEADER, contents.rows, right=("bytes", "bits per weight"), spare=("kind",))
        print(contents.summary)


def _print_metadata(metadata: dict[str, Any]) -> None:
    """One line for each value; a text of many lines, such as a template, gets as much as fits."""
    width = max(map(len, metadata))
    for key, value in metadata.items():
        text = " ".join(str(value).split())
        print(f"{key:{width}}  {text if len(text) <= LONGEST else text[: LONGEST - 4] + ' ...'}")
    print()
