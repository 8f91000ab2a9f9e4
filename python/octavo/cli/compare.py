# SPDX-License-Identifier: Apache-2.0
"""`octavo compare REFERENCE QUANTIZED`: layer by layer, on the user's own text."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._folders import load_models, read_text
from ._json import print_json

HELP = "how far a quantized folder is from its float model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference_folder", type=Path)
    parser.add_argument("quantized_folder", type=Path, help="written by `octavo quantize`")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file, one sample a line")
    parser.add_argument("--json", action="store_true", help="print JSON; Inf and NaN as strings")


def run(options: argparse.Namespace) -> None:
    from octavo.evaluation.comparison import compare
    from octavo.huggingface.models import unpadded_batches

    lines = [line.strip() for line in read_text(options.text).splitlines()]
    reference, model, tokenizer = load_models(options.reference_folder, options.quantized_folder)
    found = compare(reference, model, unpadded_batches(tokenizer, [line for line in lines if line]))
    if options.json:
        print_json(found.to_dict())
    else:
        print(found)
