# SPDX-License-Identifier: Apache-2.0
"""How few bits: the byte-level language model with each weight format, the table of docs/methods.md.

Usage, in benchmarks/: python -m suites.few_bits --output results/few-bits.json

Bits per weight are those in memory, scales and padding included; KL divergence from float in nats per byte, and how
often the first choice is the same, on 64 held-out windows of 128 bytes. The head stays float, tied to the embedding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.evaluation import bits_per_weight
from octavo.lab.study import byte_lm, byte_text
from octavo.runtime.timing import machine

SCHEMES: tuple[octavo.schemes.Scheme, ...] = (
    *(octavo.Int4WeightOnly(64, bits, symmetric=False) for bits in (2, 3, 4, 5, 6)),
    octavo.Int4WeightOnly(),
    octavo.Int4Dynamic(),
    octavo.NF4(),
    octavo.FP4(),
    octavo.MXFP4(),
    octavo.NVFP4(),
    octavo.Int8WeightOnly(),
    octavo.Int8Dynamic(),
    octavo.Int8Dynamic(group_size=32),
)
WINDOWS, LENGTH = 64, 128


def measure() -> list[dict[str, Any]]:
    """One row for each scheme, the fewest bits first."""
    model = byte_lm.load()
    ids = byte_text.held_out(WINDOWS)[:, :LENGTH]
    expected = _log_probabilities(model, ids)
    rows = []
    for scheme in SCHEMES:
        quantized = octavo.quantized(model, scheme, exclude="head")
        found = _log_probabilities(quantized, ids)
        kld = (expected.exp() * (expected - found)).sum(-1).mean().item()
        same = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
        bits = round(bits_per_weight(quantized) or 0.0, 2)
        rows.append(
            {
                "name": octavo.schemes.label(scheme),
                "bits_per_weight": bits,
                "kld": float(f"{kld:.3g}"),
                "top1_agreement": round(same, 3),
            }
        )
    return sorted(rows, key=lambda row: row["bits_per_weight"])


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
    text = f"byte language model, {WINDOWS} held-out windows of {LENGTH} bytes"
    result = {"machine": machine(), "text": text, "rows": measure()}
    print(json.dumps(result, indent=1))
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
