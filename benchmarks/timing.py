# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks add to octavo.runtime.timing: caps of every library, commit and versions, ratios."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import octavo
import rivals
from octavo.runtime.timing import Times
from octavo.runtime.timing import machine as this_machine

# The variables that hold Octavo and torch's four back ends to AVX2. ONNX Runtime and OpenVINO's MLAS have none.
CAPS = {
    "OCTAVO_MAX_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def milliseconds(times: Times) -> dict[str, float]:
    """As columns of a row: median, best, and the range that 8 of 10 rounds stayed within."""
    return {
        "median_ms": times.median * 1e3,
        "best_ms": times.best * 1e3,
        "p10_ms": times.p10 * 1e3,
        "p90_ms": times.p90 * 1e3,
    }


def figures(times: dict[str, Times], name: str) -> dict[str, float]:
    """Milliseconds of one candidate, and how many times as fast it is as the two that every benchmark has."""
    median = times[name].median
    return {
        **milliseconds(times[name]),
        "speedup_over_quantize_dynamic": times["quantize_dynamic"].median / median,
        "speedup_over_fp32": times["torch fp32"].median / median,
    }


def machine() -> dict[str, object]:
    """What a reader must know to judge the numbers."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return {
        **this_machine(),
        "octavo": octavo.__version__,
        "commit": commit.stdout.strip(),
        "caps": {name: os.environ[name] for name in CAPS if name in os.environ},
        "rivals": rivals.versions(),
    }
