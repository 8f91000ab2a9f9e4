# SPDX-License-Identifier: Apache-2.0
"""ops.attention (also in int8) against torch's scaled_dot_product_attention in float32 and bfloat16, and the errors.

Encoders look at all positions, one decoder row is causal, and decoding has one query and a cache of keys, whose bytes
set the pace: gbs is what was read of it. The tensors lie as a Linear leaves them, [batch, length, heads, dimension].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from octavo import ops, reference
from octavo.metrics import relative_error
from octavo.runtime.timing import interleaved
from timing import milliseconds


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dimension: int
    causal: bool = False


SHAPES = (
    Shape("MiniLM", 8, 12, 12, 128, 128, 32),
    Shape("BERT base", 8, 12, 12, 128, 128, 64),
    Shape("long", 8, 12, 12, 512, 512, 64),
    Shape("ViT", 1, 12, 12, 197, 197, 64),
    Shape("short", 1, 12, 12, 16, 16, 32),
    Shape("prefill", 1, 16, 16, 128, 128, 64, causal=True),
    *(Shape(f"decode {keys}", 1, 16, 16, 1, keys, 64) for keys in (32, 512, 2048)),
    Shape("decode 2048, groups of 4", 1, 16, 4, 1, 2048, 64),
)
TORCH = "torch float32"


def tensors(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(shape.batch, length, heads, shape.dimension).transpose(1, 2).to(dtype)

    q = draw(shape.heads, shape.queries)
    return q, draw(shape.kv_heads, shape.keys), draw(shape.kv_heads, shape.keys)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def candidates(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable]:
    half = q.bfloat16(), k.bfloat16(), v.bfloat16()
    ours = partial(ops.attention, causal=shape.causal)
    found: dict[str, Callable] = {
        TORCH: partial(torch_attention, q, k, v, shape.causal),
        "torch bfloat16": partial(torch_attention, *half, shape.causal),
        "octavo float32": partial(ours, q, k, v, precision="float32"),
    }
    if shape.queries == 1:
        found["octavo, bfloat16 cache"] = partial(ours, q, *half[1:])
    else:
        if has_bfloat16():
            found["octavo bfloat16"] = partial(ours, q, k, v, precision="bfloat16")
        found["octavo int8"] = partial(ours, q, k, v, precision="int8")
    return found


def has_bfloat16() -> bool:
    try:
        ops.attention(*[torch.zeros(1, 1, 16, 16)] * 3, precision="bfloat16")
    except ValueError:
        return False
    return True


def measure(shapes: tuple[Shape, ...] = SHAPES, rounds: int = 15) -> list[dict[str, object]]:
    """torch_ratio: the candidate's time over that of torch in float32."""
    rows = []
    for shape in shapes:
        q, k, v = tensors(shape)
        exact = reference.attention(q.double(), k, v, causal=shape.causal)
        size = f"{shape.batch} x {shape.heads} x {shape.queries} x {shape.keys} x {shape.dimension}"
        found = candidates(shape, q, k, v)
        with torch.inference_mode():
            times = interleaved(found, rounds=rounds, limit=0.5)
            errors = {name: relative_error(exact, run().double()) for name, run in found.items()}
        products = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.dimension
        for name in found:
            median, half = times[name].median, "bfloat16" in name
            row = {"shape": shape.name, "size": size, "candidate": name, **milliseconds(times[name])}
            row |= {"torch_ratio": median / times[TORCH].median, "error": errors[name]}
            row |= {"gflops": products / median / 1e9}
            if shape.queries == 1:
                row |= {"gbs": (k.nbytes + v.nbytes) / (2 if half else 1) / median / 1e9}
            rows.append(row)
    return rows
