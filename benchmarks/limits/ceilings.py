# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best, measured before anything else by the program in benchmarks/limits/machine.

It is compiled when it is needed (cmake and a C++ compiler); without them results lack the shares of the ceilings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/bench"


def build() -> Path:
    """The program, compiled or up to date already. Raises OSError or CalledProcessError."""
    configure = ["cmake", "-S", ROOT, "-B", FOLDER, "-DOCTAVO_BUILD_BENCHMARKS=ON"]
    for command in (configure, ["cmake", "--build", FOLDER, "--parallel"]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return FOLDER / "benchmarks/limits/machine/ceilings"


def measure(threads: int) -> dict[str, Any]:
    """What the program prints: threads; gops and gflops by instruction set; read_gbs and copy_gbs by bytes.

    Empty if it fails.
    """
    try:
        done = subprocess.run([build(), str(threads)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"ceilings: not measured: {reason}", file=sys.stderr)
        return {}
    return json.loads(done.stdout)


def fastest_seconds(
    ceilings: dict[str, Any], isa: str, shape: tuple[int, int], batch: int, cold: bool
) -> float:
    """The roofline: what an int8 layer takes at least, for its products on `isa` and for reading its weights once.

    shape    (in_features, out_features)
    cold     weights come from memory; else from the smallest cache that was measured and holds them
    """
    weight_bytes = shape[0] * shape[1]
    fitting = [int(size) for size in ceilings["read_gbs"] if int(size) >= weight_bytes and not cold]
    size = min(fitting, default=max(map(int, ceilings["read_gbs"])))
    return max(
        2 * batch * weight_bytes / ceilings["gops"][isa] / 1e9,
        weight_bytes / ceilings["read_gbs"][str(size)] / 1e9,
    )
