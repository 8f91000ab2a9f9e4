# SPDX-License-Identifier: Apache-2.0
"""The linear layer whose weight is bfloat16 or float16, kept as it is, and multiplied in float32.

Gradients are branched to in Python, as in linear.py.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from ..base.float_types import FLOAT_DTYPES
from . import shapes
from .activations import activation_number, torch_activation
from .checks import HALF_TYPES, check, wants_gradient
from .input_gradient import input_gradient
from .registration import register_fake

_linear_half = torch.ops.octavo.linear_half.default
_pack_half = torch.ops.octavo.pack_half.default
_pack_half_into = torch.ops.octavo.pack_half_into.default
_unpack_half = torch.ops.octavo.unpack_half.default
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


def packed_half_shape(n: int, k: int) -> tuple[int, int, int]:
    """The shape of a packed weight of n rows and k columns, in its own dtype."""
    return shapes.packed_half_shape(n, k)


def pack_half(weight: torch.Tensor) -> torch.Tensor:
    """The layout that `linear_half` reads; docs/packed_format.md draws it.

    weight   [n, k] bfloat16 or float16, any strides
    returns  [ceil(n / 16), k, 16] in weight's dtype, zero-padded
    raises   TypeError for another dtype; ValueError for another number of dimensions
    source   ours
    """
    check("pack_half", "weight", weight, HALF_TYPES)
    return _pack_half(weight.detach())


def pack_half_into(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """`pack_half` into memory that is there already: fills `packed`, contiguous, of weight's dtype.

    raises   as `pack_half`; ValueError if packed has another dtype or another shape than packed_half_shape(n, k)
    source   ours
    """
    check("pack_half_into", "weight", weight, HALF_TYPES)
    check("pack_half_into", "packed", packed, HALF_TYPES)
    if packed.is_neg():  # torch would fill a copy
        raise ValueError("pack_half_into: packed is a view that torch negates; use packed.resolve_neg()")
    _pack_half_into(weight.detach(), packed)


def unpack_half(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The weight [n, k] that `pack_half` was given.

    raises   TypeError for another dtype; ValueError if `packed` does not hold n x k values
    source   ours
    """
    check("unpack_half", "packed", packed, HALF_TYPES)
    return _unpack_half(packed.detach(), n, k)


def unpack_half_rows(packed: torch.Tensor, k: int, begin: int, end: int) -> torch.Tensor:
    """Rows `begin`, a multiple of 16, to `end` of that weight [end - begin, k]. Raises as `unpack_half`."""
    return unpack_half(packed[begin // 16 : -(-end // 16)], end - begin, k)


def linear_half(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with a weight of 16-bit floats and a product in float32; no weight is rounded.

    x        [..., k] float32, bfloat16 or float16, any strides; under autocast it is cast as F.linear's input is
    packed   from `pack_half`; n is the number of the weight's rows; bias [n] or None
    activation   one of ops.ACTIVATIONS, applied in float32 before the result is rounded to x's dtype
    returns  [..., n] in x's dtype. Products are added in ascending order of k, so the bits are the same on every ISA
             and for every batch; NaN and Inf are numbers like any other. Gradients reach x and bias; the weight is
             frozen
    raises   TypeError for another dtype; ValueError for shapes that do not fit and an unknown activation
    source   ours; docs/numerics.md
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("linear_half", "x", x, FLOAT_DTYPES)
    if forward_ad._current_level >= 0 or (_is_grad_enabled() and wants_gradient(x, bias)):
        return torch_activation(_linear_function().apply(x, packed, bias, n), activation)
    if activation is None:
        return _linear_half(x, packed, bias, n)
    return _linear_half(x, packed, bias, n, activation_number("linear_half", activation))


class _LinearHalf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, packed, bias, n):
        return _linear_half(x, packed, bias, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, packed, bias, ctx.n = inputs
        ctx.save_for_backward(packed)
        ctx.k = x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_y):
        (packed,) = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            k = ctx.k
            grad_x = input_gradient(grad_y, lambda a, b: unpack_half_rows(packed, k, a, b).float(), ctx.n, k)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, None


class _LinearHalfForward(_LinearHalf):
    """With forward-mode derivatives, apart because torch.compile refuses functions that have them."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _LinearHalf.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, x, packed, bias, n):
        (packed,) = ctx.saved_tensors
        y = x @ unpack_half(packed, ctx.n, ctx.k).to(x.dtype).T
        return y if bias is None else y + bias.to(y.dtype)


def _linear_function() -> type[_LinearHalf]:
    return _LinearHalf if forward_ad._current_level < 0 else _LinearHalfForward


# --- fakes ----------------------------------------------------------------------------------------------------------


@register_fake("octavo::pack_half")
def _(weight):
    return weight.new_empty(packed_half_shape(*shapes.half_weight("pack_half", weight)))


@register_fake("octavo::pack_half_into")
def _(weight, packed):
    op = "pack_half_into"
    shapes.packed_half(op, packed, *shapes.half_weight(op, weight))
    shapes.require(packed.dtype == weight.dtype, f"{op}: packed must have the dtype of weight")
    shapes.require(packed.is_contiguous(), f"{op}: packed must be contiguous")


@register_fake("octavo::unpack_half")
def _(packed, n, k):
    for name, size in (("n", n), ("k", k)):
        shapes.require(size >= 0, f"unpack_half: {name} must not be negative, got {size}")
    shapes.packed_half("unpack_half", packed, n, k)
    return packed.new_empty((n, k))


@register_fake("octavo::linear_half")
def _(x, packed, bias, n, activation=0):
    shapes.linear_half(x, packed, bias, n, activation)
    return x.new_empty((*x.shape[:-1], n))
