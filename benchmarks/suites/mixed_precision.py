# SPDX-License-Identifier: Apache-2.0
"""A scheme for each layer: what `octavo.choose` makes of a budget, against the best single scheme within it.

Layers are measured and schemes chosen on one text, both are compared on another. Bytes are those in memory, scales
included. Usage, in benchmarks/: python -m suites.mixed_precision [byte_lm] [smollm2] [--output results/NAME.json]
SmolLM2 has 210 layers and takes some minutes for each scheme to choose from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo
import tables
from octavo.evaluation.sensitivities import Sensitivity
from octavo.lab.study import byte_lm, byte_text
from octavo.schemes import Scheme, by_name, label
from timing import machine

Row = dict[str, Any]
KEPT = Path(__file__).resolve().parents[2] / "build/smollm2"
NAMES = (
    "int8-weight-only",
    *(f"int4-weight-only:bits={bits},group_size=64,symmetric=false" for bits in (6, 5, 4, 3, 2)),
)


@dataclass(frozen=True)
class Task:
    """A language model, text to choose on and text to measure on: batches of int64 [windows, context + 1]."""

    name: str
    model: nn.Module
    choosing: list[torch.Tensor]
    measuring: list[torch.Tensor]


def byte_task() -> Task:
    """The byte language model; training text to choose on."""
    choosing = byte_text.calibration(32, 129)
    return Task("byte_lm", byte_lm.load(), [choosing], list(byte_text.held_out().split(40)))


def smollm2_task() -> Task:
    """SmolLM2, whose own weights lie on a grid of 4 bits: see octavo/huggingface/smollm2.py."""
    from octavo.huggingface.smollm2 import load_smollm2
    from octavo.lab.demo_data import documentation_windows

    model, tokenizer = load_smollm2(KEPT)
    windows = documentation_windows(tokenizer, 21)
    choosing, measuring = windows[[5, 15]], windows[[i for i in range(21) if i not in (5, 15)]]
    return Task("smollm2", model, [choosing], list(measuring.split(4)))


TASKS = {"byte_lm": byte_task, "smollm2": smollm2_task}


def measure(task: Task, schemes: Iterable[Scheme]) -> list[Row]:
    """A row for each budget: the bytes of each scheme for all layers, and what lies between two neighbours."""
    inputs = [ids[:, :-1] for ids in task.choosing]
    found = octavo.sensitivity(task.model, inputs, list(schemes), progress=sys.stderr.isatty())
    uniform = {scheme: sum(row.packed_bytes for row in rows_with(found, scheme)) for scheme in schemes}
    klds = {scheme: divergence(task, scheme) for scheme in uniform}
    sizes = sorted(uniform.values())
    between = [(low + high) // 2 for low, high in zip(sizes, sizes[1:], strict=False)]
    weights = sum(rows[0].weights for rows in found.layers.values())
    rows = []
    for budget in sorted([*sizes, *between]):
        chosen = octavo.choose(found, budget=budget)
        best = min((scheme for scheme in uniform if uniform[scheme] <= budget), key=lambda each: klds[each])
        kld = divergence(task, chosen)
        rows.append(
            {
                "model": task.name,
                "budget": budget,
                "bits_per_weight": 8 * budget / weights,
                "best_uniform": label(best),
                "uniform_kld": klds[best],
                "kld": kld,
                "gain": 1 - kld / klds[best],
                "predicted": sum(row.figure for row in found.rows if chosen.get(row.name) == row.scheme),
                "bits_chosen": bits_chosen(chosen),
            }
        )
    return rows


def rows_with(found: Sensitivity, scheme: Scheme) -> list[Any]:
    return [row for row in found.rows if row.scheme == scheme]


def bits_chosen(chosen: dict[str, Scheme | None]) -> str:
    """How many layers have how many bits: "4: 10, 3: 6"."""
    bits = [32 if scheme is None else scheme.weights.bits for scheme in chosen.values()]
    return ", ".join(f"{each}: {bits.count(each)}" for each in sorted(set(bits), reverse=True))


def divergence(task: Task, chosen: Any) -> float:
    model = octavo.quantized(task.model, chosen)
    result = octavo.evaluate(task.model, model, task.measuring, kind="language_model", resources=())
    return result.distribution.kld


COLUMNS = {
    "model": "",
    "bits_per_weight": "bits per weight",
    "best_uniform": "best single scheme",
    "uniform_kld": "its KL divergence",
    "kld": "the mix's",
    "gain": "less by",
    "predicted": "predicted",
    "bits_chosen": "layers of each number of bits",
}


def page(rows: list[Row]) -> str:
    shown = [row | {"gain": f"{row['gain']:.0%}"} for row in rows]
    return tables.chosen_table(shown, COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["byte_lm"], choices=TASKS, metavar="byte_lm, smollm2")
    parser.add_argument("--schemes", nargs="+", type=by_name, default=[by_name(name) for name in NAMES])
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in chosen.models for row in measure(TASKS[name](), chosen.schemes)]
    print(page(rows))
    if chosen.output:
        chosen.output.write_text(json.dumps({"machine": machine(), "mixed_precision": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
