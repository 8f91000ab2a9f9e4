# SPDX-License-Identifier: Apache-2.0
"""The linear layers. Gradients are branched to here, in Python and only when one is wanted:
`torch.library.register_autograd` would send every call outside inference_mode through Python, 2.9 us each.

The same lines open each function on purpose: one body for all of them costs 0.2 us of the 3.8 that a small layer takes.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from ..base.float_types import FLOAT_DTYPES
from . import shapes
from .activations import activation_number, torch_activation
from .checks import check, wants_gradient
from .codes import dequantize, unpack_weight
from .input_gradient import input_gradient
from .registration import register_fake

_linear_dynamic = torch.ops.octavo.linear_dynamic.default
_linear_static = torch.ops.octavo.linear_static.default
_linear_weight_only = torch.ops.octavo.linear_weight_only.default
_linear_codes = torch.ops.octavo.linear_codes.default
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


def linear_dynamic(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    symmetric: bool = True,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights; every row of `x` is quantized to uint8 on its own, in the call.

    x        [..., k] float32, bfloat16 or float16, any strides; under autocast it is cast as F.linear's input is
    packed, column_sum   from `pack_weight`, the latter perhaps with a list from `list_saturating`
    weight_scale         float32 [n, 1]; bias [n] or None
    activation   one of ops.ACTIVATIONS, applied in float32 before the result is rounded to x's dtype
    returns  [..., n] in x's dtype; a row of x with NaN or Inf gives a row of NaN and touches no other row
             Gradients reach x and bias as if the layer were linear in x (straight-through); the weight is frozen, and
             torch's own function is the activation
    raises   TypeError for another dtype of x; ValueError for shapes that do not fit and an unknown activation
    source   per-token activations: Yao et al. 2022 (arXiv:2206.01861), section 4.1
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("linear_dynamic", "x", x, FLOAT_DTYPES)
    if forward_ad._current_level >= 0 or (_is_grad_enabled() and wants_gradient(x, weight_scale, bias)):
        y = _linear_function().apply(_linear_dynamic, x, packed, column_sum, weight_scale, bias, symmetric)
        return torch_activation(y, activation)
    if activation is None:  # an argument that is not passed costs nothing
        return _linear_dynamic(x, packed, column_sum, weight_scale, bias, symmetric)
    number = activation_number("linear_dynamic", activation)
    return _linear_dynamic(x, packed, column_sum, weight_scale, bias, symmetric, number)


def linear_static(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights and one scale for all of `x`, known beforehand: no pass to find it.

    input_scale       float32 [1], positive; input_zero_point int32 [1], -128 .. 127. Codes of x saturate there
    bias     also int32 [n], in steps of input_scale * weight_scale: then it is added to the exact sum (eq. 42)
    Other arguments, result and errors as `linear_dynamic`; ValueError for an int32 bias with which sums leave int32.
    source   Jacob et al. 2018 (arXiv:1712.05877), section 2
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("linear_static", "x", x, FLOAT_DTYPES)
    arguments = (x, packed, column_sum, weight_scale, bias, input_scale, input_zero_point)
    if forward_ad._current_level >= 0 or (_is_grad_enabled() and wants_gradient(x, weight_scale, bias)):
        return torch_activation(_linear_function().apply(_linear_static, *arguments), activation)
    if activation is None:
        return _linear_static(*arguments)
    return _linear_static(*arguments, activation_number("linear_static", activation))


def linear_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights and 16-bit activations, which are multiplied as two planes of 8 bits.

    Arguments, result and errors as `linear_dynamic`.
    source   ours; docs/numerics.md
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_DTYPES:
        check("linear_weight_only", "x", x, FLOAT_DTYPES)
    if forward_ad._current_level >= 0 or (_is_grad_enabled() and wants_gradient(x, weight_scale, bias)):
        y = _linear_function().apply(_linear_weight_only, x, packed, column_sum, weight_scale, bias)
        return torch_activation(y, activation)
    if activation is None:
        return _linear_weight_only(x, packed, column_sum, weight_scale, bias)
    number = activation_number("linear_weight_only", activation)
    return _linear_weight_only(x, packed, column_sum, weight_scale, bias, number)


def linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """`linear_dynamic`, symmetric, of rows that are codes already: the same float32 bits.

    codes    uint8 [..., k], 1 .. 255 around 128, as `add_norm_codes` makes them; rows at one distance are read in place
    scale    float32 [rows]; NaN gives a row of NaN
    returns  [..., n] float32; other arguments as `linear_dynamic`. No gradient passes
    raises   TypeError for another dtype of codes; ValueError for shapes that do not fit and an unknown activation
    source   ours
    """
    if getattr(codes, "dtype", None) != torch.uint8:
        check("linear_codes", "codes", codes, {torch.uint8})
    if _is_grad_enabled() and wants_gradient(weight_scale, bias):  # torch would warn of the missing one
        weight_scale, bias = weight_scale.detach(), None if bias is None else bias.detach()
    if activation is None:
        return _linear_codes(codes, scale, packed, column_sum, weight_scale, bias)
    number = activation_number("linear_codes", activation)
    return _linear_codes(codes, scale, packed, column_sum, weight_scale, bias, number)


class _Linear(torch.autograd.Function):
    """Every linear operator, with its arguments. Backward is that of the dequantized linear layer.

    weight_scale gets no gradient, but model.requires_grad_(True) marks it, and without this function torch would warn.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, x, packed, column_sum, weight_scale, bias, *options):
        return operator(x, packed, column_sum, weight_scale, bias, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, packed, _, weight_scale, bias, *options = inputs
        ctx.option_count = len(options)
        ctx.save_for_backward(packed, weight_scale)
        ctx.k = x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_y):
        packed, weight_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[1]:
            n, k = weight_scale.numel(), ctx.k
            grad_x = input_gradient(
                grad_y, lambda a, b: dequantized_rows(packed, weight_scale, k, a, b), n, k
            )
        if ctx.needs_input_grad[5]:
            # One axis of rows, also where there is none; reshape(-1, n) cannot tell how many rows 0 elements are.
            grad_bias = grad_y[None].flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return None, grad_x, None, None, None, grad_bias, *[None] * ctx.option_count


class _LinearForward(_Linear):
    """With forward-mode derivatives, apart because torch.compile refuses functions that have them."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Linear.setup_context(ctx, inputs, output)
        _, _, packed, _, weight_scale, *_ = inputs
        ctx.save_for_forward(packed, weight_scale)

    @staticmethod
    def jvp(ctx, operator, x, packed, column_sum, weight_scale, bias, *options):
        packed, weight_scale = ctx.saved_tensors
        y = x @ dequantized(packed, weight_scale, ctx.k, x.dtype).T
        return y if bias is None else y + bias.to(y.dtype)


def _linear_function() -> type[_Linear]:
    return _Linear if forward_ad._current_level < 0 else _LinearForward


def dequantized(packed: torch.Tensor, weight_scale: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] that a float layer would have, without gradient."""
    scale = weight_scale.detach().flatten()
    codes = unpack_weight(packed.detach(), len(scale), k)
    return dequantize(codes, scale, torch.zeros_like(scale, dtype=torch.int32), dtype)


def dequantized_rows(
    packed: torch.Tensor, weight_scale: torch.Tensor, k: int, begin: int, end: int
) -> torch.Tensor:
    """Rows `begin`, a multiple of 16, to `end` of that weight, float32 [end - begin, k]."""
    return dequantized(packed[begin // 16 : -(-end // 16)], weight_scale[begin:end], k, torch.float32)


@register_fake("octavo::linear_codes")
def _(codes, scale, packed, column_sum, weight_scale, bias, activation=0):
    shapes.require(codes.dtype == torch.uint8, "linear_codes: codes must be uint8")
    y = _output("linear_codes", codes, packed, column_sum, weight_scale, bias, activation)
    rows = shapes.rows_of(codes)
    text = f"linear_codes: scale must be float32 with one value for each of the {rows} rows"
    shapes.require(scale.dtype == torch.float32 and scale.dim() == 1, text)
    shapes.require(scale.shape[0] == rows, text)
    return y.to(torch.float32)


@register_fake("octavo::linear_dynamic")
def _(x, packed, column_sum, weight_scale, bias, symmetric, activation=0):
    shapes.float_type("linear_dynamic", "x", x)
    return _output("linear_dynamic", x, packed, column_sum, weight_scale, bias, activation)


@register_fake("octavo::linear_static")
def _(x, packed, column_sum, weight_scale, bias, *options, activation=0):
    input_scale, input_zero_point, activation = (*options, activation)[:3]
    shapes.float_type("linear_static", "x", x)
    shapes.input_qparams(input_scale, input_zero_point)
    return _output("linear_static", x, packed, column_sum, weight_scale, bias, activation)


@register_fake("octavo::linear_weight_only")
def _(x, packed, column_sum, weight_scale, bias, activation=0):
    shapes.float_type("linear_weight_only", "x", x)
    return _output("linear_weight_only", x, packed, column_sum, weight_scale, bias, activation)


def _output(op, x, packed, column_sum, weight_scale, bias, activation):
    k = shapes.columns_of(op, "codes" if op == "linear_codes" else "x", x)
    n = shapes.linear_weight(op, k, packed, column_sum, weight_scale, bias)
    shapes.activation_in_range(op, activation)
    return x.new_empty((*x.shape[:-1], n))
