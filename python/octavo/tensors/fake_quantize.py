# SPDX-License-Identifier: Apache-2.0
"""Fake quantization: the values that integers would give, in float, with a gradient to train through.

Forward is `ops.dequantize(ops.quantize(x))`, the same bits as the integer layers see. Backward passes straight through
the rounding; LSQ has a gradient for the scale as well. "Train the float weights, run the quantized ones."
"""

from __future__ import annotations

import math

import torch

from .. import ops
from ..base.float_types import FLOAT_DTYPES
from ..reference import SMALLEST_SCALE
from .granularity import PerGroup, PerToken

ESTIMATORS = ("clipped", "pure")


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    estimator: str = "clipped",
) -> torch.Tensor:
    """dequantize(quantize(x)), bit for bit, with a straight-through gradient to x and none to scale.

    x          float32, bfloat16 or float16, any shape
    scale      float32 [] or [1] for the tensor, [n] for x [n, ...]; zero_point int32, the same shape
    qmin, qmax   the codes: int8 if qmin is negative, else uint8
    estimator  "clipped": gradient 1 where x gets a code without being clipped, 0 elsewhere. "pure": 1 everywhere
    returns    x's shape and dtype; NaN becomes 0.0, as `octavo.ops.quantize` gives it the code zero_point
    raises     TypeError, ValueError for other dtypes, shapes, codes or estimators
    source     Bengio et al. 2013 (arXiv:1308.3432), section 4; clipped: Hubara et al. 2016 (arXiv:1609.07061)
               and torch.fake_quantize_per_tensor_affine; docs/numerics.md, eq. 34
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"fake_quantize: estimator is {estimator!r}, accepted are 'clipped' and 'pure'")
    _check("fake_quantize", x, scale)
    if zero_point.shape != scale.shape:
        raise ValueError(
            f"fake_quantize: zero_point has shape {list(zero_point.shape)}, it must be that of scale, "
            f"{list(scale.shape)}"
        )
    scale, within = scale.detach(), None
    if estimator == "clipped" and _may_be_derived(x):
        within = _is_within(x, scale, zero_point, qmin, qmax)
    return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, within)


def fake_quantize_per_token(
    x: torch.Tensor, symmetric: bool = True, group_size: int | None = None
) -> torch.Tensor:
    """The input of an Int8Dynamic layer as its integers have it: each row of the last axis with a scale of its own.

    x          [..., k] float32, bfloat16 or float16
    group_size   so many neighbours in a row have a scale of their own, the last ones may be fewer; None: the whole row
    returns    x's shape and dtype, with the codes of `ops.linear_dynamic`; a row with NaN or Inf becomes NaN. The
               gradient passes whole: a row's own range clips nothing
    source     as fake_quantize; per-token activations: Yao et al. 2022 (arXiv:2206.01861), section 4.1
    """
    _check_x("fake_quantize_per_token", x)
    if x.dim() == 0:
        raise ValueError("fake_quantize_per_token: x has no axis, it must be [..., k]; use x.reshape(1, 1)")
    return _FakeQuantizePerToken.apply(x, symmetric, group_size)


def quantize_bias(
    bias: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor, k: int
) -> torch.Tensor:
    """Codes of a bias that is added to integer sums: round_half_even(bias / (input_scale * weight_scale)), in float64.

    bias     [n] float; input_scale float32, one value; weight_scale float32, n values; k products in each sum
    returns  int32 [n]
    raises   ValueError for NaN, and for a code with which a sum could leave int32
    source   Jacob et al. 2018 (arXiv:1712.05877), section 2.4, eq. 11; docs/numerics.md, eq. 42
    """
    step = input_scale.detach().double().reshape(()) * weight_scale.detach().double().reshape(-1)
    codes = (bias.detach().double() / step).round_()
    room = 2**31 - 1 - 255 * 128 * k
    fits = codes.abs() <= room
    remedy = f"int32 sums over k = {k} leave room for {room}; use int32_bias=False"
    if torch.compiler.is_compiling():
        torch._assert_async(fits.all(), f"the bias is more steps of input_scale * weight_scale than {remedy}")
    elif not fits.all():
        j = int((~fits).nonzero()[0])
        raise ValueError(
            f"bias[{j}] is {bias[j].item():g}, which is {codes[j].item():g} steps of input_scale * weight_scale, and "
            f"{remedy}"
        )
    return codes.int()


def fake_quantize_bias(
    bias: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor, k: int
) -> torch.Tensor:
    """What the codes of `quantize_bias` stand for, in bias's dtype; the gradient passes straight to bias."""
    codes = quantize_bias(bias, input_scale, weight_scale, k)
    step = input_scale.detach().reshape(()) * weight_scale.detach().reshape(-1)
    return straight_through(bias, (codes.double() * step.double()).to(bias.dtype))


def lsq(
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    offset: torch.Tensor | None = None,
    grad_factor: float | None = None,
) -> torch.Tensor:
    """Fake quantization whose scale is learned ("learned step size quantization"), and with LSQ+ a zero point as well.

    x            as in fake_quantize; its gradient is the clipped one
    scale        float32 [], [1] or [n], usually a Parameter. What is used is `positive_scale(scale)`, and the gradient
                 to the scale has its sign, so that a scale that crossed zero goes on learning
    offset       what code 0 stands for, float32, scale's shape; zero_point is `offset_zero_point`. None: zero_point 0
    grad_factor  multiplies the gradients of scale and offset; None: 1 / sqrt(elements per scale * qmax). For
                 activations the paper counts the features only, not the batch: pass 1 / sqrt(features * qmax)
    returns      x's shape and dtype
    raises       TypeError, ValueError as fake_quantize; ValueError unless qmin <= 0 < qmax
    source       Esser et al. 2020 (arXiv:1902.08153), eq. 1 to 5; docs/numerics.md, eq. 35. With an offset: Bhalgat et
                 al. 2020 (LSQ+, arXiv:2004.09576), section 3.1; docs/numerics.md, eq. 43
    """
    if not qmin <= 0 < qmax:
        raise ValueError(f"lsq: needs qmin <= 0 < qmax, because 0 must be a code; got {qmin} and {qmax}")
    _check("lsq", x, scale)
    if offset is not None and (offset.dtype != torch.float32 or offset.shape != scale.shape):
        raise ValueError(
            f"lsq: offset is {offset.dtype} {list(offset.shape)}, it must be float32 and of scale's shape, "
            f"{list(scale.shape)}"
        )
    if grad_factor is None:
        grad_factor = 1 / math.sqrt(max(x.numel() // scale.numel(), 1) * qmax) if scale.numel() else 1.0
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    if offset is not None:
        zero_point = offset_zero_point(scale, offset, qmin, qmax)
    return _LSQ.apply(x, scale, offset, zero_point.reshape(-1), qmin, qmax, grad_factor)


def straight_through(
    x: torch.Tensor, values: torch.Tensor, within: torch.Tensor | None = None
) -> torch.Tensor:
    """`values`, which are x rounded in some way, with the gradient of x: where `within`, of x's shape, is True, or
    everywhere.

    source   Bengio et al. 2013 (arXiv:1308.3432), section 4
    """
    return x if values is x else _StraightThrough.apply(x, values, within)


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return _ScaledGradient.apply(x, factor)


def lsq_scale(x: torch.Tensor, qmax: int, *, axis: int | None = None) -> torch.Tensor:
    """The scale that LSQ starts from, 2 mean|x| / sqrt(qmax): float32 [1], or [C] for each index of `axis`.

    source   Esser et al. 2020 (arXiv:1902.08153), section 2.1
    """
    magnitudes = x.detach().abs().float()
    rows = magnitudes.reshape(1, -1) if axis is None else magnitudes.movedim(axis, 0).flatten(1)
    means = rows.mean(1) if rows.shape[1] else rows.new_zeros(len(rows))
    scale = 2 * means / math.sqrt(qmax)
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)  # as choose_qparams: zeros have the scale 1


def first_weight_scale(weight: torch.Tensor, covering: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """The scales that training starts from: for each row `covering`, or LSQ's where that rounds with a smaller error.

    LSQ's clips a Gaussian row at 1.6 (2 bits), 2.8 (3 bits) or 4.2 (4 bits) standard deviations. With 2 bits it wins by
    much: a scale that covers the row leaves most weights at 0. With 8 bits it is far coarser than one that covers it.
    weight     float [n, k]; covering: float32 [n], those with which nothing is clipped
    returns    float32 [n]
    source     the choice: ours; `lsq_scale`
    """
    candidates = covering, lsq_scale(weight, qmax, axis=0)
    zero_point = torch.zeros_like(covering, dtype=torch.int32)
    errors = [
        (fake_quantize(weight.detach(), scale, zero_point, qmin, qmax) - weight.detach())
        .float()
        .square()
        .sum(1)
        for scale in candidates
    ]
    return torch.where(errors[1] < errors[0], candidates[1], candidates[0])


def positive_scale(scale: torch.Tensor) -> torch.Tensor:
    """max(|scale|, 2^-126), without gradient: the scale that `lsq` computes with, and that a frozen layer must have."""
    return scale.detach().abs().clamp_min(SMALLEST_SCALE)


def offset_zero_point(scale: torch.Tensor, offset: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """The code that stands for 0 where code 0 stands for about `offset`: clamp(round(-offset / scale)), int32, without
    gradient. `scale` as `lsq` takes it."""
    return (-offset.detach() / positive_scale(scale)).round_().clamp_(qmin, qmax).to(torch.int32)


def _check_x(who: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{who}: x is {kind}, accepted are tensors of float32, bfloat16 and float16")


def _check(who: str, x: torch.Tensor, scale: torch.Tensor) -> None:
    _check_x(who, x)
    if scale.dtype != torch.float32:
        raise TypeError(f"{who}: scale is {scale.dtype}, it must be float32")
    if scale.dim() > 1 or (scale.numel() != 1 and (x.dim() == 0 or len(scale) != len(x))):
        channels = f" or [{len(x)}], one for each index of its first axis" if x.dim() else ""
        raise ValueError(
            f"{who}: scale has shape {list(scale.shape)}, x of shape {list(x.shape)} takes [], [1]{channels}"
        )


def _rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x as [rows, columns], one row for each scale."""
    return x.detach().reshape(scale.numel(), x.numel() // max(scale.numel(), 1))


def _values(
    rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    codes = ops.quantize(rows, scale, zero_point, qmin, qmax, torch.int8 if qmin < 0 else torch.uint8)
    return ops.dequantize(codes, scale, zero_point, rows.dtype)


def _steps(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(x / scale), as `ops.quantize` computes it before it clips."""
    return (rows.float() * (1 / scale)[:, None]).round_()


# --- gradients ------------------------------------------------------------------------------------------------------
#
# `setup_context` is there for the transforms of torch.func. Tensors are kept by save_for_backward and read once, for
# checkpointing hands each of them out a single time. What a gradient is multiplied by is a constant: rounding has no
# second derivative. There is no `jvp`, with which torch.compile would refuse the functions.


def _may_be_derived(x: torch.Tensor) -> bool:
    """Whether somebody may want a derivative by x. A tensor inside of `torch.vmap` does not say what is outside."""
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def _is_within(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    """Where x gets a code without being clipped: bool, a byte for each element, x's shape."""
    scale = scale.reshape(-1)
    code = _steps(_rows(x, scale), scale).add_(zero_point.reshape(-1)[:, None])
    return ((code >= qmin) & (code <= qmax)).view(x.shape)


class _FakeQuantize(torch.autograd.Function):
    """`within` says where the gradient passes; None: everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, zero_point, qmin, qmax, within):
        scale, zero_point = scale.reshape(-1), zero_point.reshape(-1)
        return _values(_rows(x, scale), scale, zero_point, qmin, qmax).view(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, within = inputs
        ctx.is_clipped = within is not None
        if within is not None:
            ctx.save_for_backward(within)

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_clipped:
            (within,) = ctx.saved_tensors
            grad = grad * within
        return grad, None, None, None, None, None


class _FakeQuantizePerToken(torch.autograd.Function):
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


class _StraightThrough(torch.autograd.Function):
    """`values`, and the gradient of x where `within` says so; None: everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, values, within):
        return values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, within = inputs
        ctx.is_clipped = within is not None
        if within is not None:
            ctx.save_for_backward(within)

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_clipped:
            (within,) = ctx.saved_tensors
            grad = grad * within
        return grad, None, None


class _ScaledGradient(torch.autograd.Function):
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


class _LSQ(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, offset, zero_point, qmin, qmax, grad_factor):
        positive = positive_scale(scale).reshape(-1)
        return _values(_rows(x, positive), positive, zero_point, qmin, qmax).view(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, _, zero_point, *ctx.options = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax, grad_factor = ctx.options
        positive = positive_scale(scale).reshape(-1)
        rows = _rows(x, positive)
        grad_rows = grad.reshape(rows.shape)
        steps = _steps(rows, positive)
        code = steps + zero_point[:, None]
        inside = (code >= qmin) & (code <= qmax)
        slope = torch.where(inside, steps - rows / positive[:, None], code.clamp(qmin, qmax))
        grad_scale = (grad_rows.float() * slope).sum(1) * grad_factor
        grad_scale = torch.where(scale.detach().reshape(-1) < 0, -grad_scale, grad_scale).view(scale.shape)
        grad_offset = None
        if ctx.needs_input_grad[2]:
            grad_offset = ((grad_rows.float() * ~inside).sum(1) * grad_factor).view(scale.shape)
        return (grad_rows * inside).view(x.shape), grad_scale, grad_offset, None, None, None, None
