# SPDX-License-Identifier: Apache-2.0
"""Prints csrc/float_isa/gelu_table.h: Phi(-a), the normal distribution's tail, as quintics around 15 centers.

Usage: python tools/gelu_table.py > csrc/float_isa/gelu_table.h, then clang-format. In each interval the polynomial
meets Phi(-a) at the six Chebyshev nodes; it is found in float64, and its coefficients are rounded to float32.
"""

from __future__ import annotations

import math

import numpy as np

WIDTH = 25 / 64  # of an interval: multiples of it are exact in float32, and 14.5 of them reach 5.66
CENTERS, DEGREE = 15, 5

HEADER = """\
// SPDX-License-Identifier: Apache-2.0
// Made by tools/gelu_table.py: with r = a - i * 25 / 64, Phi(-a) is the sum of kGeluTable[power][i] * r^power for
// |r| <= 25 / 128. Beyond the last interval a * Phi(-a) is below 5e-8, taken for 0.
#pragma once

namespace octavo {
namespace {
"""
FOOTER = """
}  // namespace
}  // namespace octavo"""


def tail(a: float) -> float:
    """Phi(-a)."""
    return math.erfc(a / math.sqrt(2)) / 2


def coefficients(center: float) -> list[float]:
    """Of the powers of a - center, lowest first, as float32."""
    nodes = [WIDTH / 2 * math.cos(math.pi * (2 * i + 1) / (2 * DEGREE + 2)) for i in range(DEGREE + 1)]
    # Scaled to [-1, 1], where the system is well conditioned.
    matrix = np.vander([2 * node / WIDTH for node in nodes], increasing=True)
    scaled = np.linalg.solve(matrix, [tail(center + node) for node in nodes])
    unscaled = [c * (2 / WIDTH) ** power for power, c in enumerate(scaled)]
    return [float(np.float32(c)) if abs(c) > 1e-12 else 0.0 for c in unscaled]


def table() -> str:
    """The text of the header."""
    rows = [coefficients(WIDTH * i) for i in range(CENTERS)] + [[0.0] * (DEGREE + 1)]
    lines = [HEADER, f"constexpr float kGeluWidth = {WIDTH}f;", ""]
    lines.append(f"alignas(64) constexpr float kGeluTable[{DEGREE + 1}][16] = {{")
    for power in range(DEGREE + 1):
        values = [f"{row[power]:.9g}" for row in rows]
        cells = [(v if "." in v or "e" in v else v + ".0") + "f" for v in values]
        lines += [
            f"    {{{', '.join(cells[:6])},",
            f"     {', '.join(cells[6:11])},",
            f"     {', '.join(cells[11:])}}},",
        ]
    return "\n".join([*lines, "};", FOOTER])


if __name__ == "__main__":
    print(table())
