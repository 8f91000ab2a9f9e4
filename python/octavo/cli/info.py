# SPDX-License-Identifier: Apache-2.0
"""`octavo info`: versions, the CPU, and the kernels in use."""

from __future__ import annotations

import argparse

HELP = "what this CPU can run, and which kernels are active"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(_: argparse.Namespace) -> None:
    import torch

    import octavo

    info = octavo.cpu_info()
    print(f"octavo   {octavo.__version__}, torch {torch.__version__}")
    print(f"cpu      {info.model}")
    print(f"isas     {', '.join(info.isas)}")
    print(f"active   {info.active}: {info.reason}")
    print(f"threads  {info.threads}")
