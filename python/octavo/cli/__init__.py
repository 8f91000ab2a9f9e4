# SPDX-License-Identifier: Apache-2.0
"""The command line: `octavo COMMAND`. One file of this folder is one command, found by listing the folder.

A command's file has HELP (one line), `add_arguments(parser)` and `run(options)`. Only these files print. What a command
needs (transformers, matplotlib) is imported in `run`, so that --help and a mistyped command do not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 1 with one line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"octavo {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def commands() -> list[str]:
    """The names of all commands, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="octavo", description="Quantize PyTorch models for CPUs.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in commands():
        command = importlib.import_module(f"{__name__}.{name}")
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
