# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks add to octavo.timing: the caps of every library, the commit, and ratios to two rivals."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import octavo
from octavo.timing import Times
from octavo.timing import machine as this_machine

# The variables that hold Octavo and torch's three back ends to AVX2.
CAPS = {
    "OCTAVO_MAX_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def figures(times: dict[str, Times], name: str) -> dict[str, float]:
    """Milliseconds of one candidate, and how many times as fast it is as the two that every benchmark has."""
    taken = times[name]
    return {
        "best_ms": taken.best * 1e3,
        "median_ms": taken.median * 1e3,
        "speedup_over_quantize_dynamic": times["quantize_dynamic"].median / taken.median,
        "speedup_over_fp32": times["torch fp32"].median / taken.median,
    }


def machine() -> dict[str, object]:
    """What a reader must know to judge the numbers."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        **this_machine(),
        "octavo": octavo.__version__,
        "commit": commit.stdout.strip(),
        "caps": {name: os.environ[name] for name in CAPS if name in os.environ},
    }
