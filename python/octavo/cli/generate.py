# SPDX-License-Identifier: Apache-2.0
"""`octavo generate MODEL --prompt TEXT`: a language model goes on with a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._types import positive_count, temperature

HELP = "let a language model continue a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a GGUF file, or a folder of transformers, quantized or not")
    parser.add_argument("--prompt", required=True, help="the text to go on with")
    parser.add_argument(
        "--tokens", type=positive_count, default=128, help="how many at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0: always the likeliest token (default)"
    )
    parser.add_argument(
        "--activations",
        choices=("int16", "int8"),
        default="int16",
        help="what the layers of a GGUF file read of their inputs (default: %(default)s, nearly exact)",
    )
    parser.add_argument("--threads", type=positive_count, help="torch threads (default: torch's)")


def run(options: argparse.Namespace) -> None:
    from ._folders import conversation

    talk = conversation(options)
    print(options.prompt, end="", flush=True)
    for piece in talk.go_on(talk.tokenizer(options.prompt)["input_ids"]):
        print(piece, end="", flush=True)
    print()
    print(f"{talk.tokens} tokens, {talk.tokens_per_second:.1f} per second", file=sys.stderr)
