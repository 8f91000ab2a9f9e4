# SPDX-License-Identifier: Apache-2.0
"""Activations, norms and rotary embeddings against what torch calls for the same values.

`octavo.keep_memory()` matters here: above malloc's threshold fresh outputs cost torch and us page faults alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import octavo
from octavo import ops
from octavo.lab.bench import random_linear
from octavo.runtime.timing import interleaved
from timing import milliseconds

Pair = tuple[str, str, Callable[[], object], Callable[[], object]]  # operator, sizes, ours, torch's
NORMS = ((16, 384), (128, 384), (1024, 384), (1024, 768))  # rows, columns
ELEMENTS = 1024 * 1536  # of MiniLM's feed-forward layer at 8 x 128


def activations(elements: int = ELEMENTS) -> Iterator[Pair]:
    x = torch.randn(elements)
    theirs = {
        "gelu": partial(F.gelu, x),
        "gelu_tanh": partial(F.gelu, x, approximate="tanh"),
        "silu": partial(F.silu, x),
    }
    for name, run in theirs.items():
        yield name, f"{elements}", partial(ops.activate, x, name), run
    both = torch.randn(128, 2 * 2816)
    gate, up = both.split(2816, dim=-1)
    yield "silu_mul", "128 x 2816 slices", partial(ops.silu_mul, gate, up), lambda: F.silu(gate) * up


def linears(rows: int = 1024) -> Iterator[Pair]:
    """Ours has the activation inside; beside it the same layer with torch's after it, and with none."""
    model = torch.nn.Sequential(random_linear(384, 1536))
    octavo.quantize_(model, octavo.Int8Dynamic())
    plain, x = model[0], torch.randn(rows, 384)
    fused = octavo.nn.QuantLinear.from_codes(
        plain.codes(), plain.weight_scale.detach(), plain.bias.detach(), plain.scheme
    )
    fused.activation = "gelu"
    size = f"{rows} x 384 to 1536"
    yield "linear + gelu", size, partial(fused, x), lambda: F.gelu(plain(x))
    yield "linear + gelu, torch: no gelu", size, partial(fused, x), partial(plain, x)


def norms() -> Iterator[Pair]:
    for rows, columns in NORMS:
        x, residual = torch.randn(rows, columns), torch.randn(rows, columns)
        weight, bias = torch.randn(columns), torch.randn(columns)
        size, shape = f"{rows} x {columns}", (columns,)
        yield (
            "add_norm",
            size,
            partial(ops.add_norm, x, residual, weight, bias, 1e-5),
            partial(_add_layer_norm, x, residual, shape, weight, bias),
        )
        codes = partial(ops.add_norm_codes, x, residual, weight, bias, 1e-5)
        yield "add_norm_codes", size, codes, partial(_add_layer_norm, x, residual, shape, weight, bias)
        theirs = partial(F.rms_norm, x, shape, weight, 1e-5)
        yield "rms_norm", size, partial(ops.rms_norm, x, weight, 1e-5), theirs


def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, shape: tuple[int], weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.layer_norm(x + residual, shape, weight, bias, 1e-5)


def ropes() -> Iterator[Pair]:
    for length in (1, 128):
        q, k = (torch.randn(1, length, heads, 64).transpose(1, 2) for heads in (16, 4))
        angle = torch.rand(1, length, 64)
        cos, sin = angle.cos(), angle.sin()
        ours = partial(ops.rope, q, k, cos, sin)
        yield "rope", f"16 and 4 heads, {length} x 64", ours, partial(_torch_rope, q, k, cos, sin)


def _torch_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers writes it."""
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def measure(
    sources: tuple[Callable[[], Iterator[Pair]], ...] = (activations, linears, norms, ropes), rounds: int = 15
) -> list[dict[str, object]]:
    """speedup_over_torch: torch's median time over ours."""
    rows = []
    with torch.inference_mode():
        for operator, size, ours, theirs in (pair for source in sources for pair in source()):
            times = interleaved({"octavo": ours, "torch": theirs}, rounds=rounds, limit=0.3)
            rows.append(
                {"operator": operator, "size": size}
                | milliseconds(times["octavo"])
                | {"torch_ms": times["torch"].median * 1e3}
                | {"speedup_over_torch": times["torch"].median / times["octavo"].median}
            )
    return rows
