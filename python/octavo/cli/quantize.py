# SPDX-License-Identifier: Apache-2.0
"""`octavo quantize MODEL OUTPUT`: one transformers folder into another."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..schemes import SCHEMES

HELP = "quantize a transformers model folder into another one"

BY_NAME = {
    scheme.__module__.rpartition(".")[2]: scheme for scheme in SCHEMES.values()
}  # one file, one scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("output", type=Path, help="new or empty folder")
    parser.add_argument(
        "--scheme", choices=sorted(BY_NAME), default="int8_dynamic", help="default: %(default)s"
    )


def run(options: argparse.Namespace) -> None:
    from ..convert import quantize_
    from ..pretrained import load_model, load_tokenizer, save_quantized

    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ValueError(f"{options.output} exists and is not an empty folder; give a new one")
    model = load_model(options.model_folder)
    tokenizer = load_tokenizer(options.model_folder)
    print(quantize_(model, BY_NAME[options.scheme]))
    save_quantized(model, tokenizer, options.output)
    print(f"saved: {options.output}")
