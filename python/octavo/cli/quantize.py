# SPDX-License-Identifier: Apache-2.0
"""`octavo quantize MODEL OUTPUT`: one folder of transformers into another, or a model into a GGUF file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ._types import scheme_called, scheme_name, size

HELP = "quantize a transformers model folder into another one, or into a GGUF file"
DEFAULT, DEFAULT_GGUF, SUFFIX = "int8-dynamic", "Q4_K_M", ".gguf"
# What llama.cpp calls types and mixtures.
_TYPES = re.compile(r"(I?Q\d(_\w+)*|TQ\d_0|B?F16|F32|MXFP4|NVFP4)", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_folder", type=Path, help="folder of transformers; for a GGUF file also another one"
    )
    parser.add_argument("output", type=Path, help=f"new or empty folder, or a file that ends on {SUFFIX}")
    parser.add_argument(
        "--scheme",
        type=_without_data,
        metavar="NAME",
        help=f"such as int8-weight-only or int8-dynamic:symmetric=false; default: {DEFAULT}. For a GGUF file a type or "
        f"a mixture of llama.cpp, such as Q8_0; default: {DEFAULT_GGUF}",
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="layers to keep float, such as lm_head"
    )
    parser.add_argument(
        "--include-embeddings",
        nargs="*",
        metavar="PATTERN",
        help="quantize embeddings as well, and heads that are tied to them; patterns say which",
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default="4GB",
        help="largest weight file, such as 500MB; default: %(default)s",
    )
    parser.add_argument(
        "--imatrix", type=Path, help="for a GGUF file: what llama.cpp has measured of the inputs' sizes"
    )


def run(options: argparse.Namespace) -> None:
    if options.output.suffix == SUFFIX:
        _write_gguf(options)
    else:
        _write_folder(options)


def _write_gguf(options: argparse.Namespace) -> None:
    from octavo.files import inspect_checkpoint, save_gguf

    from ._folders import open_model

    scheme = options.scheme or DEFAULT_GGUF
    if options.exclude:
        raise ValueError(
            "--exclude is for folders: which tensors of a GGUF file stay float, its mixture says"
        )
    model, tokenizer = open_model(options.model_folder)
    own = hasattr(model, "gguf_origin")  # the vocabulary of a GGUF file goes on as it is
    save_gguf(model, options.output, scheme, tokenizer=None if own else tokenizer, imatrix=options.imatrix)
    print(inspect_checkpoint(options.output).summary)
    print(f"saved: {options.output}")
    print(f"load it in Python: import octavo; model, tokenizer = octavo.load_gguf({str(options.output)!r})")


def _write_folder(options: argparse.Namespace) -> None:
    from octavo.conversion.folder import quantize_folder

    report = quantize_folder(
        options.model_folder,
        options.output,
        _for_folder(options.scheme),
        exclude=options.exclude,
        include_embeddings=_embeddings(options.include_embeddings),
        shard_size=options.shard_size,
        progress=True,
    )
    print(report)
    print(f"saved: {options.output}")
    print(f"load it in Python: import octavo; model = octavo.load({str(options.output)!r})")


def _for_folder(scheme: Any) -> Any:
    if not isinstance(scheme, str):
        return scheme or scheme_called(DEFAULT)
    from octavo.schemes import by_name

    try:
        return by_name(scheme)  # MXFP4 is both
    except ValueError:
        raise ValueError(
            f"--scheme {scheme} is a type of GGUF files; give an output that ends on {SUFFIX}"
        ) from None


def _embeddings(patterns: list[str] | None) -> Any:
    """False without the flag, True with nothing behind it, and the patterns otherwise."""
    return False if patterns is None else patterns or True


def _without_data(text: str) -> Any:
    """The scheme that `text` names. Those that calibrate need the model and data, which the Python functions take."""
    if _TYPES.fullmatch(text):
        return text.upper()
    scheme_name(text.partition(":")[0])  # before torch is imported
    from octavo.schemes import by_name

    try:
        scheme = by_name(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if scheme.needs_data:
        raise argparse.ArgumentTypeError(
            f"{text} needs data to calibrate: octavo.quantize_(model, scheme, data=batches) in Python takes it"
        )
    return scheme
