# SPDX-License-Identifier: Apache-2.0
"""`octavo evaluate REFERENCE QUANTIZED`: what quantization did to a model, on the user's own text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ._folders import load_models, read_text
from ._types import positive_count

HELP = "predictions, texts, size and speed of a quantized folder beside its float model's"
PROMPT_TOKENS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference_folder", type=Path)
    parser.add_argument("quantized_folder", type=Path, help="written by `octavo quantize`")
    parser.add_argument(
        "--text", type=Path, required=True, help="UTF-8 file; for an encoder, one sample a line"
    )
    parser.add_argument(
        "--window",
        type=positive_count,
        default=128,
        help="tokens a language model reads at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_count,
        default=32,
        help="tokens it writes after each of 8 prompts (default: %(default)s)",
    )
    parser.add_argument("--peak-memory", action="store_true", help="also measure it, in two new processes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace) -> None:
    from octavo.evaluation.evaluator import evaluate

    text = read_text(options.text)
    reference, model, tokenizer = load_models(options.reference_folder, options.quantized_folder)
    resources = ("size", "speed", "peak_memory") if options.peak_memory else ("size", "speed")
    result = evaluate(reference, model, **_data(reference, tokenizer, text, options), resources=resources)
    if options.json:
        print(result.to_json())
    elif options.markdown:
        print(result.to_markdown(), end="")
    elif not sys.stdout.isatty():  # rich would cut the lines to 80 columns
        print(result)
    else:
        _print_tables(result)


def _data(reference: Any, tokenizer: Any, text: str, options: argparse.Namespace) -> dict[str, Any]:
    """The data for `evaluate`: running text in windows for a causal language model, else lines."""
    import torch

    from octavo.evaluation import Prompts, windows
    from octavo.huggingface.models import unpadded_batches

    if not reference.can_generate():
        return {"data": unpadded_batches(tokenizer, [line for line in text.splitlines() if line.strip()])}
    ids = torch.tensor(tokenizer(text)["input_ids"])
    window = min(options.window, len(ids) - 1)
    if window < 2:
        raise ValueError(f"{options.text} holds {len(ids)} tokens, 3 or more are needed")
    length = min(PROMPT_TOKENS, len(ids))
    starts = sorted({i * (len(ids) - length) // 8 for i in range(8)})
    return {
        "data": windows(ids, window, batch=4),
        "kind": "language_model",
        "prompts": Prompts([ids[start : start + length] for start in starts], options.new_tokens),
        "bytes_per_token": len(text.encode()) / len(ids),
    }


def _print_tables(result: Any) -> None:
    from octavo.evaluation.views import TITLES, headline, sections

    from ._tables import print_table

    print(headline(result))
    for title, rows in sections(result).items():
        cells = [(row.label, row.reference, row.model) for row in rows]
        print_table((title, *TITLES[1:]), cells, right=TITLES[1:])
    for note in result.notes:
        print(note)
