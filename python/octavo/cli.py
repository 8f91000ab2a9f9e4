# SPDX-License-Identifier: Apache-2.0
"""The command line: `octavo info | demo | quantize | compare`. Only this file prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# One file, one scheme. Listed, not imported: --help should not wait for torch.
_SCHEME_FILES = Path(__file__).with_name("schemes").glob("*.py")
SCHEMES = tuple(sorted(file.stem for file in _SCHEME_FILES if file.stem not in ("__init__", "base")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 1 with one line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"octavo {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="octavo", description="Quantize PyTorch models for CPUs.")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what this CPU can run, and which kernels are active")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="quantize a sentence encoder and a digit classifier, measure both"
    )
    demo.add_argument("--model", help="encoder's folder or hub name (default: the bundled all-MiniLM-L6-v2)")
    demo.add_argument("--output", default="octavo-demo", help="folder for the plots (default: %(default)s)")
    demo.add_argument("--threads", type=_positive, default=1, help="torch threads (default: %(default)s)")
    demo.set_defaults(run=_demo)

    quantize = commands.add_parser("quantize", help="quantize a transformers model folder into another one")
    quantize.add_argument("model_folder", type=Path)
    quantize.add_argument("output", type=Path, help="new or empty folder")
    quantize.add_argument("--scheme", choices=SCHEMES, default="int8_dynamic", help="default: %(default)s")
    quantize.set_defaults(run=_quantize)

    compare = commands.add_parser("compare", help="how far a quantized folder is from its float model")
    compare.add_argument("reference_folder", type=Path)
    compare.add_argument("quantized_folder", type=Path, help="written by `octavo quantize`")
    compare.add_argument("--text", type=Path, required=True, help="UTF-8 file, one sample a line")
    compare.set_defaults(run=_compare)
    return parser


# Each command imports what it needs, so that --help and a mistyped command do not wait for transformers.


def _info(_: argparse.Namespace) -> None:
    import torch

    import octavo

    info = octavo.cpu_info()
    print(f"octavo   {octavo.__version__}, torch {torch.__version__}")
    print(f"cpu      {info.model}")
    print(f"isas     {', '.join(info.isas)}")
    print(f"active   {info.active}: {info.reason}")
    print(f"threads  {info.threads}")


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    print("Quantizing and measuring, about half a minute ...", file=sys.stderr, flush=True)
    print(run(options.model, options.output, threads=options.threads))


def _quantize(options: argparse.Namespace) -> None:
    from .convert import quantize_
    from .pretrained import load_model, load_tokenizer, save_quantized
    from .schemes import SCHEMES as CLASSES

    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ValueError(f"{options.output} exists and is not an empty folder; give a new one")
    model = load_model(options.model_folder)
    tokenizer = load_tokenizer(options.model_folder)
    by_file = {scheme.__module__.rpartition(".")[2]: scheme for scheme in CLASSES.values()}
    print(quantize_(model, by_file[options.scheme]))
    save_quantized(model, tokenizer, options.output)
    print(f"saved: {options.output}")


def _compare(options: argparse.Namespace) -> None:
    from .compare import compare
    from .pretrained import load_model, load_quantized, load_tokenizer, unpadded_batches

    lines = [line.strip() for line in options.text.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{options.text} holds no text; give a file with one sample a line")
    reference = load_model(options.reference_folder)
    model = load_quantized(options.quantized_folder, reference)
    tokenizer = load_tokenizer(options.reference_folder)
    print(compare(reference, model, unpadded_batches(tokenizer, [line for line in lines if line])))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
