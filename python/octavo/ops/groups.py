# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight has a scale for each group of k, and what belongs to their packed form.

A weight [n, k] in groups is value = scale * (u - offset) + minimum, where u is an unsigned code of `bits` bits, or what
a table has for the code. docs/packed_format.md draws how codes and scales lie, docs/numerics.md says what is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ..base.float_types import FLOAT_DTYPES
from . import group_shapes, shapes
from .activations import activation_number, torch_activation
from .checks import check, check_dtype, wants_gradient
from .registration import register_fake

_linear_groups = torch.ops.octavo.linear_groups.default
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled
Optional = torch.Tensor | None


class GroupWeight(NamedTuple):
    """A weight [n, k] in groups: column_scale * (scale * (u - offset) + minimum), packed.

    codes    with 1 to 7 bits from `pack_planes`; with 8 bits from `pack_weight`, and u = code + 128
    scale    [strips, groups, 16] float32, bfloat16, float16 or float8_e4m3fn, for strips = ceil(n / 16) and groups of
             `group_size`, a multiple of 16 or 0 for one group; uint8: powers of two, 2^(byte - 127); with super_scale
             uint8 or int8, integers; None: 1
    super_scale   float32, bfloat16 or float16 [strips, supers, rows, 16]: factors of `scale`, and in a second row,
             which weights with minima have, of -minimum; groups // supers groups share them
    minimum  None; floats of scale's shape; uint8 with super_scale; uint8 without: zero points, -scale * them is added.
             None and two rows of super_scale: bytes of `scale` hold a scale in the low half, a minimum in the high
    table    uint8 [16]: u = table[code], with 4 bits. Above 127, at most offset + 127, and groups are multiples of 32
    column_scale  float32 [n]; None: 1
    """

    codes: torch.Tensor
    scale: Optional
    super_scale: Optional
    minimum: Optional
    table: Optional
    column_scale: Optional
    n: int
    bits: int
    group_size: int
    offset: int


def group_weight(
    codes: torch.Tensor,
    scale: Optional = None,
    *,
    n: int,
    bits: int,
    group_size: int,
    offset: int,
    **others: Optional,
) -> GroupWeight:
    """A GroupWeight; `others` are its other tensors by name, None if they are left out."""
    left_out: dict[str, Any] = dict.fromkeys(GroupWeight._fields[2:6])
    unknown = others.keys() - left_out.keys()
    if unknown:
        raise TypeError(f"group_weight: a weight in groups has no {', '.join(sorted(unknown))}")
    numbers: dict[str, Any] = {"n": n, "bits": bits, "group_size": group_size, "offset": offset}
    return GroupWeight(codes=codes, scale=scale, **{**left_out, **others}, **numbers)


def linear_groups(
    x: torch.Tensor,
    weight: GroupWeight,
    bias: Optional = None,
    input_bits: int = 8,
    input_group: int = 0,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias for a weight that has groups along k.

    x        [..., k] float32, bfloat16 or float16, any strides; under autocast it is cast as F.linear's input is
    bias     [n] or None
    input_bits    8 or 16: codes of x. With 8 there is a scale for each row and `input_group` elements of k, a multiple
             of 32; 0 and 16 bits: one scale for each row
    activation    one of ops.ACTIVATIONS, applied in float32 before the result is rounded to x's dtype
    returns  [..., n] in x's dtype; a row of x with NaN or Inf gives a row of NaN and touches no other row.
             Gradients reach x and bias as if the layer were linear in x (straight-through); the weight is frozen
    raises   TypeError for another dtype of x; ValueError for what does not fit
    source   ours; docs/numerics.md, eq. 61 and 62
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("linear_groups", "x", x, FLOAT_DTYPES)
    if forward_ad._current_level >= 0 or (
        _is_grad_enabled() and wants_gradient(x, weight.scale, weight.column_scale, bias)
    ):
        return torch_activation(_function().apply(x, *weight, bias, input_bits, input_group), activation)
    if activation is None:
        return _linear_groups(x, *weight, bias, input_bits, input_group)
    number = activation_number("linear_groups", activation)
    return _linear_groups(x, *weight, bias, input_bits, input_group, number)


def dequantize_groups(weight: GroupWeight, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [n, k] that `linear_groups` multiplies by: computed in float64, rounded to float32 and to `dtype`.

    dtype    float32, bfloat16 or float16
    raises   as `linear_groups`
    """
    check_dtype("dequantize_groups", dtype, FLOAT_DTYPES)
    return torch.ops.octavo.dequantize_groups(*weight, k, dtype)


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes as `linear_groups` reads them: bits / 8 bytes for each weight, and padding.

    codes    uint8 [n, k]; bits 1 .. 7 of each are kept
    returns  uint8 [ceil(n / 16), 2 * ceil(k / 64), bits, 64]; docs/packed_format.md draws it
    """
    check("pack_planes", "codes", codes, {torch.uint8})
    return torch.ops.octavo.pack_planes(codes, bits)


def unpack_planes(planes: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes uint8 [n, k] that `pack_planes` has packed."""
    check("unpack_planes", "planes", planes, {torch.uint8})
    return torch.ops.octavo.unpack_planes(planes, n, k)


class _LinearGroups(torch.autograd.Function):
    """linear_groups with its arguments. Backward is that of the dequantized linear layer; scales get no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _linear_groups(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *weight, bias, _, _ = inputs
        ctx.save_for_backward(*weight[:6])
        ctx.k, ctx.numbers = x.shape[-1], weight[6:]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_y):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ _dense(ctx, grad_y.dtype)
        if ctx.needs_input_grad[11]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (grad_x, *[None] * 10, grad_bias, None, None)


class _LinearGroupsForward(_LinearGroups):
    """With forward-mode derivatives, apart because torch.compile refuses functions that have them."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _LinearGroups.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:7])

    @staticmethod
    def jvp(ctx, x, *rest):
        y = x @ _dense(ctx, x.dtype).T
        bias = rest[10]
        return y if bias is None else y + bias.to(y.dtype)


def _function() -> type[_LinearGroups]:
    return _LinearGroups if forward_ad._current_level < 0 else _LinearGroupsForward


def _dense(ctx: Any, dtype: torch.dtype) -> torch.Tensor:
    fields: list[Any] = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
    return dequantize_groups(GroupWeight(*fields, *ctx.numbers), ctx.k, dtype)


@register_fake("octavo::linear_groups")
def _(x, *arguments, input_bits=8, input_group=0, activation=0):
    weight, (bias, *given) = GroupWeight(*arguments[:10]), arguments[10:]
    options = [input_bits, input_group, activation]
    options[: len(given)] = given
    input_bits, input_group, activation = options
    shapes.float_type("linear_groups", "x", x)
    group_shapes.group_weight("linear_groups", shapes.columns_of("linear_groups", "x", x), weight)
    shapes.float_vector("linear_groups", "bias", bias, weight.n)
    group_shapes.group_input("linear_groups", input_bits, input_group)
    shapes.activation_in_range("linear_groups", activation)
    return x.new_empty((*x.shape[:-1], weight.n))


@register_fake("octavo::dequantize_groups")
def _(*arguments):
    *tensors_and_numbers, k, dtype = arguments
    weight = GroupWeight(*tensors_and_numbers)
    shapes.require(k >= 0, f"dequantize_groups: k must not be negative, is {k}")
    shapes.require(dtype in FLOAT_DTYPES, "dequantize_groups: dtype must be float32, bfloat16 or float16")
    group_shapes.group_weight("dequantize_groups", k, weight)
    return weight.codes.new_empty((weight.n, k), dtype=dtype)


@register_fake("octavo::pack_planes")
def _(codes, bits):
    group_shapes.plane_bits("pack_planes", bits)
    shapes.require(codes.dim() == 2 and codes.dtype == torch.uint8, "pack_planes: codes must be uint8 [n, k]")
    n, k = codes.shape
    return codes.new_empty(group_shapes.planes_shape(n, k, bits))


@register_fake("octavo::unpack_planes")
def _(planes, n, k):
    shapes.require(n >= 0 and k >= 0, f"unpack_planes: n and k must not be negative, got {n} and {k}")
    bits = planes.shape[2] if planes.dim() == 4 else 0
    group_shapes.plane_bits("unpack_planes", bits)
    group_shapes.packed_planes("unpack_planes", "planes", planes, n, k, bits)
    return planes.new_empty((n, k))
