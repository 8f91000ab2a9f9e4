# SPDX-License-Identifier: Apache-2.0
"""What `torch.vmap` makes of the operators.

Without a rule torch calls an operator for each element of the batch, warns, and does so beneath our functions: a
gradient that is wanted outside of the vmap, as in `torch.func.grad(lambda x: torch.vmap(layer)(x).sum())`, would be
zero without a word. The rules look for gradients, as our functions do. Rows are independent, so where a batch only has
more rows it is one call; everything else is called for each element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS, activate, silu_mul, torch_activation
from .checks import wants_gradient
from .half import unpack_half
from .linear import dequantized
from .norms import add_norm, add_norm_codes, rms_norm, rope
from .softmax_attention import PRECISIONS, attention

NAMES = (None, *ACTIVATIONS)  # of the operators' numbers
InDims = tuple[int | None, ...]
Result = tuple[Any, Any]


def _one_by_one(function: Callable[..., Any], info: Any, in_dims: InDims, *arguments: Any) -> Result:
    results = []
    for i in range(info.batch_size):
        pairs = zip(arguments, in_dims, strict=True)
        results.append(function(*(value if dim is None else value.select(dim, i) for value, dim in pairs)))
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
    return torch.stack(results), 0


def _with_more_rows(function: Callable[..., Any], info: Any, in_dims: InDims, *arguments: Any) -> Result:
    """`function` of x [..., k], if nothing else is batched: the others are weights."""
    first, *others = in_dims
    if first is None or any(dim is not None for dim in others) or arguments[0].dim() < 2:
        return _one_by_one(function, info, in_dims, *arguments)
    return function(arguments[0].movedim(first, 0), *arguments[1:]), 0


def _with_more_matrices(function: Callable[..., Any], info: Any, in_dims: InDims, *arguments: Any) -> Result:
    """`function` of tensors whose first axis is that of the rows: [batch, rows, ...] becomes [batch * rows, ...]."""

    def joined(value: Any, dim: int | None) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        whole = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        return whole.flatten(0, 1)

    result = function(*map(joined, arguments, in_dims))
    shape = (info.batch_size, -1)
    if isinstance(result, tuple):
        return tuple(each.unflatten(0, shape) for each in result), (0,) * len(result)
    return result.unflatten(0, shape), 0


# --- the operators, with their arguments ------------------------------------------------------------------------------


def _linear(operator: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`operator`, which after `count` arguments takes an activation's number, left out if it is 0.

    torch takes no autograd.Function inside of a rule. So the gradient is that of a float product from which its own
    value is subtracted, and which thus adds nothing.
    """

    def call(*arguments: Any) -> torch.Tensor:
        x, packed, _, weight_scale, bias, *_ = arguments
        if not (torch.is_grad_enabled() and wants_gradient(x, bias)):
            return operator(*arguments)
        detached = (
            value.detach() if isinstance(value, torch.Tensor) else value for value in arguments[:count]
        )
        weight = dequantized(packed, weight_scale, x.shape[-1], torch.float32)
        product = F.linear(x.float(), weight, None if bias is None else bias.float())
        y = operator(*detached) + (product - product.detach()).to(x.dtype)
        return torch_activation(y, *(NAMES[number] for number in arguments[count:] or (0,)))

    return call


def _linear_half(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int, activation: int = 0
) -> torch.Tensor:
    operator = torch.ops.octavo.linear_half.default
    if not (torch.is_grad_enabled() and wants_gradient(x, bias)):
        return operator(x, packed, bias, n, activation)
    weight = unpack_half(packed, n, x.shape[-1]).float()
    product = F.linear(x.float(), weight, None if bias is None else bias.float())
    value = operator(x.detach(), packed, None if bias is None else bias.detach(), n)
    return torch_activation(value + (product - product.detach()).to(x.dtype), NAMES[activation])


def _activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    return activate(x, ACTIVATIONS[activation - 1])


def _attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, precision: int) -> torch.Tensor:
    return attention(q, k, v, mask, causal=causal, scale=scale, precision=PRECISIONS[precision])


def _register(rule: Callable[..., Result], functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():

        def rule_of(info: Any, in_dims: InDims, *arguments: Any, _function: Any = function) -> Result:
            return rule(_function, info, in_dims, *arguments)

        torch.library.register_vmap(f"octavo::{name}", rule_of)


def _operators(*names: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(torch.ops.octavo, name).default for name in names}


_register(
    _with_more_rows,
    {
        "linear_dynamic": _linear(torch.ops.octavo.linear_dynamic.default, 6),
        "linear_static": _linear(torch.ops.octavo.linear_static.default, 7),
        "linear_weight_only": _linear(torch.ops.octavo.linear_weight_only.default, 5),
        "linear_half": _linear_half,
        **_operators("embedding_groups", "embedding_half"),
    },
)
_register(_with_more_matrices, _operators("choose_qparams", "quantize", "dequantize"))
_register(
    _one_by_one,
    {
        "activate": _activate,
        "silu_mul": silu_mul,
        "rms_norm": rms_norm,
        "add_norm": add_norm,
        "add_norm_codes": add_norm_codes,
        "rope": rope,
        "attention": _attention,
        **_operators("linear_codes", "int8_mm", "pack_weight", "unpack_weight", "pack_half", "unpack_half"),
    },
)
