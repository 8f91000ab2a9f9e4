# SPDX-License-Identifier: Apache-2.0
"""What a call costs before any arithmetic: a 64 x 64 layer with one row, and every rival that is installed."""

from __future__ import annotations

import torch

import rivals
from octavo.lab.bench import exact_linear, measure_candidates, octavo_candidates, random_linear
from suites.layers import candidate_of, row_of, schemes


def measure(only: list[str] | None = None) -> list[dict[str, object]]:
    """Milliseconds per call. only: names or files of rivals; None or empty: all."""
    linear = random_linear(64, 64)
    x = torch.randn(1, 64)
    chosen = [rival for rival in rivals.available(only)[0] if rival.takes(x.dtype, 1)]
    candidates = [candidate_of(rival, linear) for rival in chosen] + octavo_candidates(linear, schemes())
    measured = measure_candidates(candidates, x, exact_linear(linear, x))
    rows = [row_of(measurement, chosen) for measurement in measured]
    fp32 = next((row["median_ms"] for row in rows if row["candidate"] == "torch fp32"), None)
    for row in rows:
        if fp32 is not None and "median_ms" in row:
            row["beyond_fp32_us"] = (row["median_ms"] - fp32) * 1e3
    return rows
