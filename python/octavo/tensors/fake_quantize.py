# SPDX-License-Identifier: Apache-2.0
"""Fake quantization: the values that integers would give, in float, with a gradient to train through.

Forward is `ops.dequantize(ops.quantize(x))`, the same bits as the integer layers see. Backward passes straight through
the rounding; LSQ has a gradient for the scale as well. "Train the float weights, run the quantized ones."
"""

from __future__ import annotations

import math

import torch

from ..base.float_types import FLOAT_DTYPES
from ..reference import SMALLEST_SCALE
from .straight_through import (
    LSQ,
    FakeQuantize,
    FakeQuantizePerToken,
    ScaledGradient,
    StraightThrough,
    derived,
    positive_scale,
    rows_for,
    steps_of,
)

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
    return derived(FakeQuantize, x, scale, zero_point, qmin, qmax, within)


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
    return derived(FakeQuantizePerToken, x, symmetric, group_size)


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
    elif not _unwrapped(fits).all():
        if fits is not _unwrapped(fits):  # inside of torch.vmap, where no element can be named
            raise ValueError(f"a bias is more steps of input_scale * weight_scale than {remedy}")
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
    return derived(LSQ, x, scale, offset, zero_point.reshape(-1), qmin, qmax, grad_factor)


def straight_through(
    x: torch.Tensor, values: torch.Tensor, within: torch.Tensor | None = None
) -> torch.Tensor:
    """`values`, which are x rounded in some way, with the gradient of x: where `within`, of x's shape, is True, or
    everywhere.

    source   Bengio et al. 2013 (arXiv:1308.3432), section 4
    """
    return x if values is x else derived(StraightThrough, x, values, within)


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return derived(ScaledGradient, x, factor)


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
    code = steps_of(rows_for(x, scale), scale).add_(zero_point.reshape(-1)[:, None])
    return ((code >= qmin) & (code <= qmax)).view(x.shape)


def _unwrapped(x: torch.Tensor) -> torch.Tensor:
    """The tensor with all that torch.func's transforms batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
