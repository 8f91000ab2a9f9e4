# SPDX-License-Identifier: Apache-2.0
"""The same bits, other codes: each method on the byte-level language model, the tables of docs/methods.md.

Usage, in benchmarks/: python -m suites.weight_codes --output results/weight-codes.json

KL divergence from float in nats per byte, on 64 held-out windows of 128 bytes; 128 windows of training text are the
data of the methods that learn from some. The head stays float, as it is tied to the embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.lab.study import byte_lm, byte_text
from octavo.methods import Method
from octavo.runtime.timing import machine

METHODS: tuple[Method, ...] = (
    octavo.RoundToNearest(),
    octavo.ClipSearch(),
    octavo.HQQ(),
    octavo.AWQ(),
    octavo.GPTQ(scales=octavo.RoundToNearest()),
    octavo.GPTQ(),
    octavo.SmoothQuant(then=octavo.GPTQ()),
    octavo.AWQ(then=octavo.GPTQ()),
)
BITS = (4, 3, 2)


def measure() -> list[dict[str, Any]]:
    """One row for each method: the KL divergences with 4, 3 and 2 bits, and the seconds of the slowest."""
    model = byte_lm.load()
    held_out = byte_text.held_out(64)[:, :-1]
    data = list(byte_text.calibration(128).split(16))
    expected = _log_probabilities(model, held_out)
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": octavo.schemes.label(method)}
        took = []
        for bits in BITS:
            scheme = octavo.Int4WeightOnly(64, bits, symmetric=False, method=method)
            start = time.process_time()
            quantized = octavo.quantized(model, scheme, data=data, exclude="head")
            took.append(time.process_time() - start)
            found = _log_probabilities(quantized, held_out)
            kld = (expected.exp() * (expected - found)).sum(-1).mean().item()
            row[f"kld_{bits}"] = float(f"{kld:.3g}")
            row[f"top1_{bits}"] = round((expected.argmax(-1) == found.argmax(-1)).double().mean().item(), 3)
        rows.append({**row, "seconds": round(max(took), 1)})
    return rows


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).double().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), "weight_codes": measure()}
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if chosen.output:
        chosen.output.write_text(text)


if __name__ == "__main__":
    main()
