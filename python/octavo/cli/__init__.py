# SPDX-License-Identifier: Apache-2.0
"""The command line: `octavo COMMAND`. One file of this folder is one command, found by listing the folder.

A command's file has HELP (one line), `add_arguments(parser)` and `run(options)`. Only these files print. What a command
needs, the package and torch above all, is imported in `run`, so that --help and a mistyped command do not wait for it:
the installed script (python/octavo_command) loads this folder without the package around it. Relative imports reach
files of this folder only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # what shells give for a program that Ctrl-C ended
TRACEBACK = "OCTAVO_TRACEBACK"  # an environment variable: if it is set, errors are raised
# Errors that say themselves what is wrong; any other one is told with its kind.
TELLING = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 with one line on stderr for bad input, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"octavo {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"octavo {options.command}: {_line(error)}", file=sys.stderr)
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


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return text or "not enough memory"
    if text and isinstance(error, TELLING):
        return text
    return f"{type(error).__name__}: {text}; with {TRACEBACK}=1 in the environment it says where"
