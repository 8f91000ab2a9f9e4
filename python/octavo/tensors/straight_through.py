# SPDX-License-Identifier: Apache-2.0
"""The derivatives of fake quantization: straight through the rounding, and by the scale where that is learned.

`setup_context` is there for the transforms of torch.func. Tensors are kept by save_for_backward and read once, for
checkpointing hands each of them out a single time. What a gradient is multiplied by is a constant: rounding has no
second derivative. Forward mode has classes of its own, because torch.compile refuses functions with a `jvp`.
"""

from __future__ import annotations

import math

import torch
from torch.autograd import forward_ad

from .. import ops
from ..reference import SMALLEST_SCALE
from .granularity import PerGroup, PerToken


def positive_scale(scale: torch.Tensor) -> torch.Tensor:
    """max(|scale|, 2^-126), without gradient: the scale that `lsq` computes with, and that a frozen layer must have."""
    return scale.detach().abs().clamp_min(SMALLEST_SCALE)


def rows_for(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x as [rows, columns], one row for each scale."""
    return x.detach().reshape(scale.numel(), x.numel() // max(scale.numel(), 1))


def steps_of(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(x / scale), as `ops.quantize` computes it before it clips."""
    return (rows.float() * (1 / scale)[:, None]).round_()


def _values(
    rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    codes = ops.quantize(rows, scale, zero_point, qmin, qmax, torch.int8 if qmin < 0 else torch.uint8)
    return ops.dequantize(codes, scale, zero_point, rows.dtype)


class _WithinMask(torch.autograd.Function):
    """The gradient of the first argument passes where the last one, `within`, says so; None: everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, within = inputs
        ctx.is_clipped, ctx.others = within is not None, len(inputs) - 1
        if within is not None:
            ctx.save_for_backward(within)

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_clipped:
            (within,) = ctx.saved_tensors
            grad = grad * within
        return grad, *[None] * ctx.others


class FakeQuantize(_WithinMask):
    """x rounded to codes of these qparams."""

    @staticmethod
    def forward(x, scale, zero_point, qmin, qmax, within):
        scale, zero_point = scale.reshape(-1), zero_point.reshape(-1)
        return _values(rows_for(x, scale), scale, zero_point, qmin, qmax).view(x.shape)


class FakeQuantizePerToken(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, symmetric, group_size):
        qmin, qmax = (1, 255) if symmetric else (0, 255)
        rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        finite = rows.isfinite().all(1, keepdim=True)
        rows = torch.where(finite, rows, 0.0)
        granularity = PerToken() if group_size is None else PerGroup(group_size)
        groups = granularity.to_rows(rows)
        scale, zero_point = ops.choose_qparams(groups, qmin, qmax, symmetric)
        values = granularity.from_rows(_values(groups, scale, zero_point, qmin, qmax), rows.shape)
        return torch.where(finite, values, torch.nan).view(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class StraightThrough(_WithinMask):
    """`values`, with the gradient of x."""

    @staticmethod
    def forward(x, values, within):
        return values.clone()


class ScaledGradient(torch.autograd.Function):
    """x, whose gradient is multiplied by `factor`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class LSQ(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, offset, zero_point, qmin, qmax, grad_factor):
        positive = positive_scale(scale).reshape(-1)
        return _values(rows_for(x, positive), positive, zero_point, qmin, qmax).view(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, _, zero_point, *ctx.options = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        inside, slope = _lsq_slopes(x, scale, zero_point, *ctx.options[:2])
        grad_factor = ctx.options[-1]
        grad_rows = grad.reshape(inside.shape)
        grad_scale = (grad_rows.float() * slope).sum(1) * grad_factor
        grad_scale = torch.where(scale.detach().reshape(-1) < 0, -grad_scale, grad_scale).view(scale.shape)
        grad_offset = None
        if ctx.needs_input_grad[2]:
            grad_offset = ((grad_rows.float() * ~inside).sum(1) * grad_factor).view(scale.shape)
        return (grad_rows * inside).view(x.shape), grad_scale, grad_offset, None, None, None, None


def _lsq_slopes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where x gets a code without being clipped, and dy / d|scale|, both of the shape of the rows."""
    positive = positive_scale(scale).reshape(-1)
    rows = rows_for(x, positive)
    steps = steps_of(rows, positive)
    code = steps + zero_point[:, None]
    inside = (code >= qmin) & (code <= qmax)
    return inside, torch.where(inside, steps - rows / positive[:, None], code.clamp(qmin, qmax))


# --- forward mode -----------------------------------------------------------------------------------------------------


class _WithinMaskForward(_WithinMask):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _WithinMask.setup_context(ctx, inputs, output)
        *_, within = inputs
        if within is not None:
            ctx.save_for_forward(within)

    @staticmethod
    def jvp(ctx, x, *_):
        return x * ctx.saved_tensors[0] if ctx.is_clipped else x.clone()


class _FakeQuantizeForward(_WithinMaskForward, FakeQuantize):
    pass


class _FakeQuantizePerTokenForward(FakeQuantizePerToken):
    @staticmethod
    def jvp(ctx, x, *_):
        return x.clone()


class _StraightThroughForward(_WithinMaskForward, StraightThrough):
    pass


class _ScaledGradientForward(ScaledGradient):
    @staticmethod
    def jvp(ctx, x, *_):
        return x * ctx.factor


class _LSQForward(LSQ):
    @staticmethod
    def setup_context(ctx, inputs, output):
        LSQ.setup_context(ctx, inputs, output)
        x, scale, _, zero_point, *_ = inputs
        ctx.save_for_forward(x, scale, zero_point)

    @staticmethod
    def jvp(ctx, x, scale, offset, *_):
        """Of what `backward` multiplies gradients by, so that the two modes agree: grad_factor is in it."""
        value, sign, zero_point = ctx.saved_tensors
        inside, slope = _lsq_slopes(value, sign, zero_point, *ctx.options[:2])
        y = torch.zeros_like(slope, dtype=value.dtype)
        if x is not None:
            y = y + x.reshape(inside.shape) * inside
        for tangent, factor in (
            (scale, slope * torch.where(sign < 0, -1, 1).reshape(-1, 1)),
            (offset, ~inside),
        ):
            if tangent is not None:
                y = y + (tangent.reshape(-1, 1) * ctx.options[-1] * factor).to(y.dtype)
        return y.view(value.shape)


_FORWARD = {
    FakeQuantize: _FakeQuantizeForward,
    FakeQuantizePerToken: _FakeQuantizePerTokenForward,
    StraightThrough: _StraightThroughForward,
    ScaledGradient: _ScaledGradientForward,
    LSQ: _LSQForward,
}


def derived(function: type[torch.autograd.Function], *arguments: object) -> torch.Tensor:
    """What `function`, one of the classes of this file, gives; with forward-mode derivatives if those are asked for."""
    kind = function if forward_ad._current_level < 0 else _FORWARD[function]
    result: torch.Tensor = kind.apply(*arguments)
    return result
