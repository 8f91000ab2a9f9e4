# SPDX-License-Identifier: Apache-2.0
"""`octavo info`: versions, the CPU, and the kernels in use."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ._json import print_json

HELP = "what this CPU can run, and which kernels are active"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    import torch

    import octavo

    info = octavo.cpu_info()
    if options.json:
        print_json({"octavo": octavo.__version__, "torch": torch.__version__, **asdict(info)})
        return
    print(f"octavo   {octavo.__version__}, torch {torch.__version__}")
    print(f"cpu      {info.model}")
    print(f"isas     {', '.join(info.isas)}")
    print(f"active   {info.active}: {info.reason}")
    print(f"threads  {info.threads}")
