# SPDX-License-Identifier: Apache-2.0
"""`octavo compare REFERENCE QUANTIZED`: layer by layer, on the user's own text."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "how far a quantized folder is from its float model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference_folder", type=Path)
    parser.add_argument("quantized_folder", type=Path, help="written by `octavo quantize`")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file, one sample a line")


def run(options: argparse.Namespace) -> None:
    from ..compare import compare
    from ..pretrained import load_model, load_quantized, load_tokenizer, unpadded_batches

    lines = [line.strip() for line in options.text.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{options.text} holds no text; give a file with one sample a line")
    reference = load_model(options.reference_folder)
    model = load_quantized(options.quantized_folder)
    tokenizer = load_tokenizer(options.reference_folder)
    print(compare(reference, model, unpadded_batches(tokenizer, [line for line in lines if line])))
