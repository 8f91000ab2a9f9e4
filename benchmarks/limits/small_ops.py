# SPDX-License-Identifier: Apache-2.0
"""quantize, dequantize and choose_qparams against a copy that moves the same number of bytes, in a cache and beyond.

Two copies: into a buffer that exists, which is what memory allows, and into a fresh one, as our operators return it.
Above malloc's threshold a fresh buffer costs more page faults than copying; `octavo.keep_memory()` ends those.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from octavo import ops
from octavo.runtime.timing import interleaved
from timing import milliseconds

SIZES = {"L2": 1 << 16, "L3": 1 << 21, "memory": 1 << 25}  # elements; bytes moved are 2 to 5 times as many
CHANNELS = {"per tensor": 1, "per channel": 64}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def operators(x: torch.Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> what to call, and the bytes that it reads and writes."""
    scale, zero_point = ops.choose_qparams(x, -127, 127, True)
    codes = ops.quantize(x, scale, zero_point, -127, 127, torch.int8)
    both = x.nbytes + codes.nbytes
    return {
        "choose_qparams": (partial(ops.choose_qparams, x, -127, 127, True), x.nbytes),
        "quantize": (partial(ops.quantize, x, scale, zero_point, -127, 127, torch.int8), both),
        "dequantize": (partial(ops.dequantize, codes, scale, zero_point, x.dtype), both),
    }


def copies(size: int) -> dict[str, Callable[[], object]]:
    """Of `size` bytes read and written in all."""
    source = torch.ones(size // 2, dtype=torch.uint8)
    return {"copy": partial(torch.empty_like(source).copy_, source), "fresh copy": source.clone}


def measure(sizes: dict[str, int] = SIZES, rounds: int = 15) -> list[dict[str, object]]:
    """copy_ratio, fresh_copy_ratio: the copy's time over the operator's; 0.9 is 90 % of the copy's speed."""
    rows = []
    for (place, elements), (dtype, channels) in itertools.product(
        sizes.items(), itertools.product(DTYPES, CHANNELS)
    ):
        x = torch.randn(CHANNELS[channels], elements // CHANNELS[channels]).to(DTYPES[dtype])
        for name, (run, size) in operators(x).items():
            with torch.inference_mode():
                times = interleaved({name: run, **copies(size)}, rounds=rounds, limit=0.5)
            median = times[name].median
            rows.append(
                {"operator": name, "place": place, "dtype": dtype, "scales": channels, "bytes": size}
                | milliseconds(times[name])
                | {"gbs": size / median / 1e9}
                | {"copy_ratio": times["copy"].median / median}
                | {"fresh_copy_ratio": times["fresh copy"].median / median}
            )
    return rows
