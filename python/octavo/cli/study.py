# SPDX-License-Identifier: Apache-2.0
"""`octavo study`: every registered scheme on one small language model, as tables, JSON and a plot; with --train, what
training through the rounding of few bits wins back."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ._types import positive_count, scheme_called, scheme_name

if TYPE_CHECKING:
    from octavo.base.tables import Tables
    from octavo.lab.study.study_result import StudyResult
    from octavo.lab.study.training_result import TrainingResult

HELP = "measure every scheme on a small language model; needs a source checkout"
CHECKOUT = (
    "the study and its language model come with Octavo's sources and not with the installed package; run it from a "
    "checkout: `pip install --editable .` there, then `octavo study`"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default="octavo-study", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="instead, weights of 8, 4, 3 and 2 bits before and after training, ten minutes on one core",
    )
    parser.add_argument(
        "--schemes",
        nargs="+",
        type=scheme_name,
        metavar="NAME",
        help="default: all; with --train int8-dynamic",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the text: seconds, coarse figures")
    parser.add_argument(
        "--threads",
        type=positive_count,
        default=1,
        help="torch threads of the timed calls (default: %(default)s)",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="also put the tables between the marks of this Markdown file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("octavo.lab.study") is None:
        raise ImportError(CHECKOUT)
    result = (_training if options.train else _study)(options)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result)
    for path in result.save(options.output):
        print(f"saved: {path}", file=sys.stderr)
    if options.into:
        result.write_into(options.into)
        print(f"tables written into {options.into}", file=sys.stderr)


def _study(options: argparse.Namespace) -> StudyResult | TrainingResult:
    from octavo.lab.study.study import QUICK, StudySettings, run
    from octavo.runtime.timing import torch_threads

    chosen = None
    if options.schemes:
        chosen = [variant for name in options.schemes for variant in scheme_called(name).study_variants()]
    print("Quantizing and measuring, some minutes ...", file=sys.stderr, flush=True)
    with torch_threads(options.threads):
        return run(chosen, settings=QUICK if options.quick else StudySettings(), progress=sys.stderr.isatty())


def _training(options: argparse.Namespace) -> StudyResult | TrainingResult:
    from octavo.lab.study.training_study import QUICK, TrainingStudySettings, run, variants

    chosen = variants([scheme_called(name) for name in options.schemes]) if options.schemes else None
    print("Training and measuring, some ten minutes ...", file=sys.stderr, flush=True)
    return run(
        chosen, settings=QUICK if options.quick else TrainingStudySettings(), progress=sys.stderr.isatty()
    )


def _print(result: Tables) -> None:
    from ._tables import print_table

    if not sys.stdout.isatty():  # rich would cut the lines to 80 columns
        print(result)
        return
    for table in result.tables():
        print(table.title)
        print_table(table.header, table.rows, right=table.header[1:])
    print(result.footer)
