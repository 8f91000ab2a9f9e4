# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and of documents in docs/ from committed results, so that they cannot
differ, and draws docs/performance.png.

Usage: python benchmarks/readme.py [--check]. A table stands between two comments:

    <!-- benchmarks: layers zen4-1-thread -->    TABLES' name, and a file of benchmarks/results without .json
    <!-- end -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import roofline
import tables
from suites import low_bits, mixed_precision, speech

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = tuple(
    ROOT / name for name in ("README.md", "docs/performance.md", "docs/methods.md", "docs/fusion.md")
)
PICTURED = "zen4-1-thread"
BLOCK = re.compile(r"(<!-- benchmarks: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def layers(dtype: str, weights: str) -> Callable[[dict[str, Any]], str]:
    def write(results: dict[str, Any]) -> str:
        return tables.layer_summary(
            [row for row in results["layers"] if (row["dtype"], row["weights"]) == (dtype, weights)]
        )

    return write


def plain(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda results: tables.plain_table(results[name])


def chosen(name: str, columns: dict[str, str]) -> Callable[[dict[str, Any]], str]:
    return lambda results: tables.chosen_table(results[name], columns)


FUSION = {
    "model": "model",
    "size": "input",
    "candidate": "",
    "median_ms": "ms",
    "time_over_quantize_dynamic": "of quantize_dynamic's time",
    "time_over_openvino_static": "of OpenVINO static's",
    "cosine": "cosine to fp32",
}
DECODING = {
    "context": "tokens before",
    "candidate": "",
    "median_ms": "ms per token",
    "time_over_unfused": "of the time before",
}
ATTENTION = {
    "shape": "",
    "size": "batch x heads x queries x keys x D",
    "candidate": "",
    "median_ms": "ms",
    "torch_ratio": "of torch's time",
    "error": "relative error",
    "gflops": "GFLOPS",
    "gbs": "GB/s of keys and values",
}
LANGUAGE_MODEL = {
    "name": "",
    "bits_per_weight": "bits per weight",
    "kld": "KL divergence",
    "top1_agreement": "same first choice",
}
WEIGHT_CODES = {
    "method": "method",
    "kld_4": "4 bits",
    "kld_3": "3 bits",
    "kld_2": "2 bits",
    "top1_3": "same first choice, 3 bits",
    "seconds": "seconds",
}
FLOAT_OPS = {
    "operator": "",
    "size": "",
    "median_ms": "ms",
    "torch_ms": "torch ms",
    "speedup_over_torch": "torch over ours",
}

TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": lambda results: f"{results['machine']['cpu']}\n\n{tables.machine_lines(results['machine'])}",
    "ceilings": lambda results: tables.ceilings_section(results["ceilings"]).partition("\n\n")[2],
    "speedups": lambda results: tables.speedups(results["layers"]),
    "layers": layers("f32", "warm"),
    "layers_cold": layers("f32", "cold"),
    "layers_bf16": layers("bf16", "warm"),
    "divergences": lambda results: tables.divergences(results["rows"]),
    "ahead": lambda results: tables.ahead_section(results["layers"]).partition("\n\n")[2],
    "attention": chosen("attention", ATTENTION),
    "float_ops": chosen("float_ops", FLOAT_OPS),
    "fusion": chosen("fusion", FUSION),
    "decoding": chosen("decoding", DECODING),
    "low_bits": lambda results: low_bits.page(results["low_bits"]),
    "language_model": chosen("rows", LANGUAGE_MODEL),
    "weight_codes": chosen("weight_codes", WEIGHT_CODES),
    "speech": chosen("speech", speech.COLUMNS),
    "mixed_precision": lambda results: mixed_precision.page(results["mixed_precision"]),
    **{name: plain(name) for name in ("small_ops", "overhead", "startup", "encoder", "decoder", "memory")},
}


def written(text: str, folder: Path) -> str:
    """`text` with every block made anew from the results in `folder`.

    raises   ValueError for a table that does not exist; OSError without the results
    """

    def block(match: re.Match[str]) -> str:
        start, name, source, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}, there are {', '.join(TABLES)}")
        results = json.loads((folder / f"{source}.json").read_text())
        return f"{start}\n{TABLES[name](results)}\n\n{end}"

    return BLOCK.sub(block, text)


def main() -> int:
    if "--check" not in sys.argv[1:]:
        results = json.loads((RESULTS / f"{PICTURED}.json").read_text())
        roofline.plot(results, ROOT / "docs/performance.png")
    differing = 0
    for document in DOCUMENTS:
        text = document.read_text()
        new = written(text, RESULTS)
        if "--check" not in sys.argv[1:]:
            document.write_text(new)
        elif new != text:
            differing += 1
            print(f"{document.name}: tables differ from benchmarks/results: run python benchmarks/readme.py")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
