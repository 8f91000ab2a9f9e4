# SPDX-License-Identifier: Apache-2.0
"""The types of GGML side by side: bits, what is left of Gaussian weights, and the cost of encoding, decoding, packing.

The table of types in the documents: `python -m limits.ggml_types`, run in benchmarks/, prints it in markdown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import octavo
from octavo import ops
from octavo.formats import BLOCK_TYPES
from octavo.nn import QuantLinear

WIDTH, ERROR_ROWS = 4096, 512
Row = dict[str, Any]


def best_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Of the processor, the shortest of some calls."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def row_of(type: str, weight: torch.Tensor, rounds: int = 3) -> Row:
    """Of one type: encoding in seconds, the other costs in GB/s, decoding by the floats that it writes, packing by the
    bytes of the file."""
    k = weight.shape[1]
    blocks = ops.ggml_quantize(weight, type)
    packed = ops.ggml_pack(blocks, type, k)
    layer = QuantLinear.from_tensors({"weight_blocks": blocks}, None, octavo.GGML(type)).pack_()
    off = ops.ggml_dequantize(blocks[:ERROR_ROWS], type, k) - weight[:ERROR_ROWS]
    relative = (off.norm() / weight[:ERROR_ROWS].norm()).item()
    seconds = {
        "encode": best_seconds(lambda: ops.ggml_quantize(weight, type), 1),
        "decode": best_seconds(lambda: ops.ggml_dequantize(blocks, type, k), rounds),
        "pack": best_seconds(lambda: ops.ggml_pack(blocks, type, k), rounds),
        "unpack": best_seconds(lambda: ops.ggml_unpack(*packed, type, len(weight), k), rounds),
    }
    return {
        "type": type,
        "bits_in_files": BLOCK_TYPES[type].bits_per_weight,
        "bits_in_memory": 8 * sum(buffer.nbytes for buffer in layer.buffers()) / weight.numel(),
        "relative_error": relative,
        "sqnr_db": -20 * torch.tensor(relative).log10().item(),
        "encode_seconds": seconds["encode"],
        "decode_gbs": weight.nbytes / seconds["decode"] / 1e9,
        "pack_gbs": blocks.nbytes / seconds["pack"] / 1e9,
        "unpack_gbs": blocks.nbytes / seconds["unpack"] / 1e9,
    }


def measure(width: int = WIDTH) -> list[Row]:
    """Every type, of a Gaussian weight [width, width]."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return [row_of(type, weight) for type in BLOCK_TYPES]


def table(rows: list[Row]) -> str:
    """Markdown, the types with the least bits first."""
    lines = ["| type | bits, files | bits, memory | SQNR, dB | encode, s | decode, GB/s | pack, GB/s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["bits_in_files"]):
        numbers = row["bits_in_files"], row["bits_in_memory"], row["sqnr_db"], row["encode_seconds"]
        cells = [
            *(f"{number:.4g}" for number in numbers),
            *(f"{row[f'{key}_gbs']:.2g}" for key in ("decode", "pack")),
        ]
        lines.append(f"| {row['type']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(measure()))
