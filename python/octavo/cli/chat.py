# SPDX-License-Identifier: Apache-2.0
"""`octavo chat MODEL`: talk with a language model. Ctrl-C ends an answer, Ctrl-D or an empty line the conversation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ._types import positive_count, temperature

HELP = "talk with a language model; Ctrl-C ends the answer, an empty line the conversation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a GGUF file, or a folder of transformers, quantized or not")
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument(
        "--tokens", type=positive_count, default=512, help="of an answer, at most (default: %(default)s)"
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
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        _answer(talk, question)


def _answer(talk: Any, question: str) -> None:
    """Prints the answer as it comes. Ctrl-C ends it, not the program."""
    pieces = talk.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    finally:
        pieces.close()
    print()
    print(f"({talk.tokens} tokens, {talk.tokens_per_second:.1f} per second)", file=sys.stderr)
