# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 with every scheme: bits per weight, megabytes, KL divergence and top-1 against float, tokens per second, and
the answer to a plain question.

Usage, in benchmarks/: python -m suites.language_model [--schemes NAME ...] [--threads N] [--output results/NAME.json]
A name is one of the command line's, with options: int8-dynamic, int4-weight-only:bits=3,group_size=64
The floats are kept in build/smollm2, 538 MB, because reading them takes longer than measuring a scheme.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import octavo
from octavo.lab import language_demo
from octavo.schemes import SCHEMES, Scheme, by_name

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build/smollm2"


def schemes() -> list[Scheme]:
    """Every registered scheme that needs no data, as its study has it, and SmoothQuant."""
    plain = [variant for scheme in SCHEMES.values() for variant in scheme.study_variants()]
    return [each for each in plain if not each.needs_data] + [octavo.Int8Dynamic(method=octavo.SmoothQuant())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", nargs="+", type=by_name, metavar="NAME", help="default: all")
    parser.add_argument("--windows", type=int, default=language_demo.Settings.windows)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    result = language_demo.run(
        chosen.schemes or schemes(),
        threads=chosen.threads,
        settings=language_demo.Settings(windows=chosen.windows),
        keep_in=KEPT,
        progress=True,
    )
    print(result.to_markdown())
    if chosen.output:
        chosen.output.write_text(json.dumps(result.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
