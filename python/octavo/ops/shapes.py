# SPDX-License-Identifier: Apache-2.0
"""What each operator accepts, in Python, for the two ways that do not pass the checks in C++: fakes, and gradients.

Both sides say the same sentences; tests/ops/test_operator_errors.py holds them to each other. Sizes may be symbols.
"""

from __future__ import annotations

from math import prod

import torch

from ..base.float_types import FLOAT_DTYPES
from .checks import CODE_TYPES, HALF_TYPES

Condition = bool | torch.SymBool
Shape = tuple[int, ...]


def require(condition: Condition, text: str) -> None:
    """Raises ValueError unless the condition holds, or is about a size that nobody knows before the kernel does."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import (
            guard_or_true,
        )  # slow to import, and only for tracing

        condition = guard_or_true(condition)
    if not condition:
        raise ValueError(text)


def known(condition: Condition) -> bool:
    """Whether the condition holds for all sizes that a graph may be run with; the graph gets no guard for it."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import (
            guard_or_false,  # slow to import, and only for tracing
        )

        condition = guard_or_false(condition)
    return bool(condition)


def float_type(op: str, name: str, tensor: torch.Tensor) -> None:
    require(tensor.dtype in FLOAT_DTYPES, f"{op}: {name} must be float32, bfloat16 or float16")


def float_vector(op: str, name: str, tensor: torch.Tensor | None, count: int) -> None:
    if tensor is not None:
        _vector(tensor, count, f"{op}: {name} must have {count} values")
        float_type(op, name, tensor)


def matrix(op: str, name: str, tensor: torch.Tensor) -> Shape:
    require(tensor.dim() == 2, f"{op}: {name} must have 2 dimensions [rows, columns], has {tensor.dim()}")
    return tuple(tensor.shape)


def columns_of(op: str, name: str, tensor: torch.Tensor, axes: str = " [..., k]") -> int:
    require(tensor.dim() >= 1, f"{op}: {name} needs at least 1 dimension{axes}, has none")
    return tensor.shape[-1]


def alike(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    text = f"{op}: {name} must have the shape and the dtype of {other_name}"
    require(tensor.dtype == other.dtype and tensor.dim() == other.dim(), text)
    for size, expected in zip(tensor.shape, other.shape, strict=True):
        require(size == expected, text)


def activation_in_range(op: str, activation: int) -> None:
    text = "activation must be 0 (none), 1 (relu), 2 (gelu), 3 (gelu_tanh) or 4 (silu)"
    require(0 <= activation <= 4, f"{op}: {text}, is {activation}")


# --- codes ----------------------------------------------------------------------------------------------------------


def code_range(op: str, qmin: int, qmax: int, low: int, high: int) -> None:
    text = f"{op}: qmin and qmax are {qmin} and {qmax}; need {low} <= qmin < qmax <= {high}"
    require(low <= qmin and qmin < qmax and qmax <= high, text)


def qparams(op: str, scale: torch.Tensor, zero_point: torch.Tensor, rows: int) -> None:
    for name, tensor, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        text = f"{op}: {name} must be {_short(dtype)} with one value for each of the {rows} rows"
        require(tensor.dtype == dtype, text)
        _vector(tensor, rows, text)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, dtype: torch.dtype
) -> None:
    rows, _ = matrix("quantize", "x", x)
    float_type("quantize", "x", x)
    limits = torch.iinfo(dtype)
    code_range("quantize", qmin, qmax, limits.min, limits.max)
    qparams("quantize", scale, zero_point, rows)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype
) -> None:
    rows, _ = matrix("dequantize", "codes", codes)
    require(dtype in FLOAT_DTYPES, "dequantize: dtype must be float32, bfloat16 or float16")
    qparams("dequantize", scale, zero_point, rows)


def codes(op: str, name: str, dtype: torch.dtype) -> None:
    require(dtype in CODE_TYPES, f"{op}: {name} must be int8 or uint8")


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """The shape of a packed weight of n rows and k columns."""
    return (n + 15) // 16, (k + 63) // 64, 16, 64


def packed_weight(op: str, packed: torch.Tensor, n: int, k: int) -> None:
    strips, tiles, *_ = shape = packed_shape(n, k)
    text = (
        f"{op}: packed does not hold a weight of {n} x {k}; need int8 [{strips}, {tiles}, 16, 64] as pack_weight "
        "makes it"
    )
    require(packed.dtype == torch.int8 and packed.dim() == 4, text)
    for size, expected in zip(packed.shape, shape, strict=True):
        require(size == expected, text)


# --- linear layers --------------------------------------------------------------------------------------------------


def linear_weight(
    op: str,
    k: int,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> int:
    """n, if the weight has k columns and all of it fits together."""
    text = f"{op}: weight_scale must be float32 [n, 1]"
    require(weight_scale.dtype == torch.float32 and weight_scale.dim() == 2, text)
    require(weight_scale.shape[1] == 1, text)
    n, tiles = weight_scale.shape[0], (k + 63) // 64
    text = f"{op}: x has {k} features, packed was made for another number of them"
    require(packed.dim() == 4, text)
    require(packed.shape[1] == tiles, text)
    packed_weight(op, packed, n, k)
    text = f"{op}: column_sum must be int32 with {n} values"
    require(column_sum.dtype == torch.int32 and column_sum.dim() == 1, text)
    require(column_sum.shape[0] >= n, text)
    if bias is not None and bias.dtype == torch.int32 and op == "linear_static":
        _vector(bias, n, f"{op}: bias must have {n} values")
    else:
        float_vector(op, "bias", bias, n)
    return n


def input_qparams(input_scale: torch.Tensor, input_zero_point: torch.Tensor) -> None:
    for name, tensor, dtype in (
        ("input_scale", input_scale, torch.float32),
        ("input_zero_point", input_zero_point, torch.int32),
    ):
        text = f"linear_static: {name} must be {_short(dtype)} with 1 value"
        require(tensor.dtype == dtype, text)
        require(tensor.numel() == 1, text)


def half_weight(op: str, weight: torch.Tensor) -> tuple[int, int]:
    n, k = matrix(op, "weight", weight)
    require(weight.dtype in HALF_TYPES, f"{op}: weight must be bfloat16 or float16")
    return n, k


def packed_half_shape(n: int, k: int) -> tuple[int, int, int]:
    """The shape of a packed weight of 16-bit floats, n rows and k columns."""
    return (n + 15) // 16, k, 16


def packed_half(op: str, packed: torch.Tensor, n: int, k: int) -> None:
    strips, *_ = shape = packed_half_shape(n, k)
    text = (
        f"{op}: packed does not hold a weight of {n} x {k}; need bfloat16 or float16 [{strips}, {k}, 16] as pack_half "
        "makes it"
    )
    require(packed.dtype in HALF_TYPES and packed.dim() == 3, text)
    for size, expected in zip(packed.shape, shape, strict=True):
        require(size == expected, text)


def linear_half(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int, activation: int
) -> None:
    op = "linear_half"
    float_type(op, "x", x)
    k = columns_of(op, "x", x)
    require(n >= 0, f"{op}: n must not be negative, got {n}")
    text = f"{op}: x has {k} features, packed was made for another number of them"
    require(packed.dim() == 3, text)
    require(packed.shape[1] == k, text)
    packed_half(op, packed, n, k)
    float_vector(op, "bias", bias, n)
    activation_in_range(op, activation)


# --- float operators ------------------------------------------------------------------------------------------------


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> None:
    float_type("silu_mul", "gate", gate)
    columns_of("silu_mul", "gate", gate, "")
    alike("silu_mul", "up", up, "gate", gate)


def norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    float_type(op, "x", x)
    count = columns_of(op, "x", x)
    float_vector(op, "weight", weight, count)
    float_vector(op, "bias", bias, count)
    if residual is not None:
        alike(op, "residual", residual, "x", x)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    require(
        cos.dim() == 3, f"rope: cos must have 3 dimensions [1 or batch, length, columns], has {cos.dim()}"
    )
    alike("rope", "sin", sin, "cos", cos)
    for name, x in (("q", q), ("k", k)):
        text = f"rope: {name} must have 4 dimensions [batch, heads, length, columns], has {x.dim()}"
        require(x.dim() == 4, text)
        float_type("rope", name, x)
        float_type("rope", "cos", cos)
        batch, _, length, columns = x.shape
        pairs = cos.shape[2]
        text = f"rope: cos must have the shape [1 or {batch}, {length}, at most {columns} and even] to fit {name}"
        _require_broadcast(cos.shape[0], batch, text)
        for condition in (cos.shape[1] == length, pairs <= columns, pairs % 2 == 0):
            require(condition, text)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        text = f"attention: {name} must have 4 dimensions [batch, heads, length, dimension], has {x.dim()}"
        require(x.dim() == 4, text)
    batch, heads, queries, dimension = q.shape
    _, kv_heads, keys, _ = k.shape
    text = (
        f"attention: the heads of q have dimension {dimension}; accepted are multiples of 16 up to 128; pad q, k and v "
        "with zeros, or use torch's scaled_dot_product_attention"
    )
    for condition in (dimension % 16 == 0, dimension >= 16, dimension <= 128):
        require(condition, text)
    text = f"attention: k has batch {k.shape[0]} and dimension {k.shape[3]}, q has {batch} and {dimension}"
    require(k.shape[0] == batch, text)
    require(k.shape[3] == dimension, text)
    for size, expected in zip(v.shape, (batch, kv_heads, keys, dimension), strict=True):
        require(size == expected, "attention: v must have the shape of k")
    text = (
        f"attention: q has {heads} heads and k {kv_heads}; both need at least 1, and the first must be a multiple of "
        "the second"
    )
    require(heads > 0, text)
    require(kv_heads > 0, text)
    require(heads % kv_heads == 0, text)
    for name, x in (("q", q), ("k", k), ("v", v)):
        float_type("attention", name, x)
    if mask is not None:
        _attention_mask(mask, (batch, heads, queries, keys))


def _attention_mask(mask: torch.Tensor, shape: Shape) -> None:
    if mask.dtype != torch.bool:
        float_type("attention", "mask", mask)
    text = f"attention: mask must have 1 to 4 dimensions, has {mask.dim()}"
    require(1 <= mask.dim() <= 4, text)
    for axis, (size, needed) in enumerate(zip(mask.shape, shape[4 - mask.dim() :], strict=True)):
        text = (
            f"attention: mask has size {size} where [batch, heads, queries, keys] has {needed}; give a mask that can "
            "be broadcast, with all keys in its last dimension"
        )
        if axis + 1 < mask.dim():
            _require_broadcast(size, needed, text)
        else:
            require(size == needed, text)


def rows_of(x: torch.Tensor) -> int:
    """How many rows the axes before the last hold together."""
    return prod(x.shape[:-1])


def _require_broadcast(size: int, needed: int, text: str) -> None:
    if not isinstance(size, int) or size != 1:
        require(size == needed, text)


def _vector(tensor: torch.Tensor, count: int, text: str) -> None:
    require(tensor.dim() == 1, text)
    require(tensor.shape[0] == count, text)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
