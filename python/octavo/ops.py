# SPDX-License-Identifier: Apache-2.0
"""Typed wrappers of `torch.ops.octavo.*`, their fakes (shapes for torch.compile and torch.export) and gradients.

The C++ side holds the schemas and the kernels. Gradients are branched to here, in Python and only when one is wanted:
`torch.library.register_autograd` would send every call outside inference_mode through Python, 2.9 us each.
"""

from __future__ import annotations

import torch

from . import _C  # noqa: F401  loading it registers the operators

FLOAT_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
CODE_TYPES = frozenset({torch.int8, torch.uint8})

# Looked up once: 0.3 us for each attribute path.
_choose_qparams = torch.ops.octavo.choose_qparams.default
_quantize = torch.ops.octavo.quantize.default
_dequantize = torch.ops.octavo.dequantize.default
_int8_mm = torch.ops.octavo.int8_mm.default
_pack_weight = torch.ops.octavo.pack_weight.default
_unpack_weight = torch.ops.octavo.unpack_weight.default
_linear_dynamic = torch.ops.octavo.linear_dynamic.default
_linear_static = torch.ops.octavo.linear_static.default
_linear_weight_only = torch.ops.octavo.linear_weight_only.default
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled


def choose_qparams(
    x: torch.Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every row of `x`, so that the row's range fits the codes [qmin, qmax].

    x        [rows, columns] float32, bfloat16 or float16
    returns  scale float32 [rows] > 0, real units per step; zero_point int32 [rows]
    raises   TypeError for another dtype; ValueError for NaN or Inf (names the row) and for a bad range
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    _check("choose_qparams", "x", x, FLOAT_TYPES)
    return _choose_qparams(x.detach(), qmin, qmax, symmetric)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, dtype: torch.dtype
) -> torch.Tensor:
    """Codes of `x`: clamp(round_half_even(x / scale) + zero_point, qmin, qmax). NaN becomes zero_point.

    x        [rows, columns] float32, bfloat16 or float16; scale float32 [rows]; zero_point int32 [rows]
    returns  [rows, columns], `dtype` int8 or uint8
    raises   TypeError for another dtype; ValueError for shapes that do not fit and a range outside `dtype`
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    _check("quantize", "x", x, FLOAT_TYPES)
    _check_dtype("quantize", dtype, CODE_TYPES)
    return _quantize(x.detach(), scale.detach(), zero_point, qmin, qmax, dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Real values: scale * (code - zero_point), rounded once to float32 and then to `dtype`.

    codes    [rows, columns] int8 or uint8; scale float32 [rows]; zero_point int32 [rows]
    returns  [rows, columns], `dtype` float32, bfloat16 or float16
    raises   TypeError for another dtype; ValueError for shapes that do not fit
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    _check("dequantize", "codes", codes, CODE_TYPES)
    _check_dtype("dequantize", dtype, FLOAT_TYPES)
    return _dequantize(codes, scale.detach(), zero_point, dtype)


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, exact: no saturation, no 7-bit trick.

    a        [m, k] int8 or uint8; b [k, n] int8; any strides; k at most 65,793
    returns  [m, n] int32
    raises   TypeError for another dtype; ValueError for shapes that do not fit and a longer k
    source   ours
    """
    _check("int8_mm", "a", a, CODE_TYPES)
    _check("int8_mm", "b", b, {torch.int8})
    return _int8_mm(a, b)


def pack_weight(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout that the linear kernels read; docs/packed_format.md draws it.

    codes    [n, k] int8
    returns  packed int8 [ceil(n / 16), ceil(k / 64), 16, 64], zero-padded; column_sum int32 [n], the sum over k
    raises   TypeError for another dtype; ValueError for another number of dimensions
    source   ours
    """
    _check("pack_weight", "codes", codes, {torch.int8})
    return _pack_weight(codes)


def unpack_weight(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes [n, k] int8 that `pack_weight` was given.

    raises   TypeError for another dtype; ValueError if `packed` does not hold n x k codes
    source   ours
    """
    _check("unpack_weight", "packed", packed, {torch.int8})
    return _unpack_weight(packed, n, k)


def linear_dynamic(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights; every row of `x` is quantized to uint8 on its own, in the call.

    x        [..., k] float32, bfloat16 or float16, any strides; under autocast it is cast as F.linear's input is
    packed, column_sum   from `pack_weight`; weight_scale float32 [n, 1]; bias [n] or None
    returns  [..., n] in x's dtype; a row of x with NaN or Inf gives a row of NaN and touches no other row
             Gradients reach x and bias as if the layer were linear in x (straight-through); the weight is frozen
    raises   TypeError for another dtype of x; ValueError for shapes that do not fit
    source   per-token activations: Yao et al. 2022 (arXiv:2206.01861), section 4.1
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_TYPES:
        _check("linear_dynamic", "x", x, FLOAT_TYPES)
    if _is_grad_enabled() and _wants_gradient(x, weight_scale, bias):
        return _Linear.apply(_linear_dynamic, x, packed, column_sum, weight_scale, bias, symmetric)
    return _linear_dynamic(x, packed, column_sum, weight_scale, bias, symmetric)


def linear_static(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights and one scale for all of `x`, known beforehand: no pass to find it.

    input_scale       float32 [1], positive; input_zero_point int32 [1], -128 .. 127. Codes of x saturate at both
    Other arguments, result and errors as `linear_dynamic`.
    source   Jacob et al. 2018 (arXiv:1712.05877), section 2
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_TYPES:
        _check("linear_static", "x", x, FLOAT_TYPES)
    arguments = (x, packed, column_sum, weight_scale, bias, input_scale, input_zero_point)
    if _is_grad_enabled() and _wants_gradient(x, weight_scale, bias):
        return _Linear.apply(_linear_static, *arguments)
    return _linear_static(*arguments)


def linear_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights and 16-bit activations, which are multiplied as two planes of 8 bits.

    Arguments, result and errors as `linear_dynamic`.
    source   ours; docs/numerics.md
    """
    if _is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if getattr(x, "dtype", None) not in FLOAT_TYPES:
        _check("linear_weight_only", "x", x, FLOAT_TYPES)
    if _is_grad_enabled() and _wants_gradient(x, weight_scale, bias):
        return _Linear.apply(_linear_weight_only, x, packed, column_sum, weight_scale, bias)
    return _linear_weight_only(x, packed, column_sum, weight_scale, bias)


def _wants_gradient(x: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> bool:
    # weight_scale gets no gradient, but model.requires_grad_(True) marks it, and then torch would warn.
    return x.requires_grad or weight_scale.requires_grad or (bias is not None and bias.requires_grad)


def _check(op: str, name: str, tensor: torch.Tensor, accepted: frozenset | set) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, a torch.Tensor is needed")
    if tensor.dtype not in accepted:
        raise TypeError(
            f"{op}: {name} is {_short(tensor.dtype)}, accepted: {_names(accepted)}; convert with .to(dtype)"
        )


def _check_dtype(op: str, dtype: torch.dtype, accepted: frozenset) -> None:
    if dtype not in accepted:
        raise TypeError(f"{op}: dtype is {_short(dtype)}, accepted: {_names(accepted)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: frozenset | set) -> str:
    return ", ".join(sorted(map(_short, dtypes)))


class _Linear(torch.autograd.Function):
    """Every linear operator, with its arguments. Backward is that of the dequantized linear layer."""

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
            codes = _unpack_weight(packed, weight_scale.shape[0], ctx.k)
            zero_point = torch.zeros(weight_scale.shape[0], dtype=torch.int32)
            grad_x = grad_y @ _dequantize(codes, weight_scale.detach().flatten(), zero_point, grad_y.dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return None, grad_x, None, None, None, grad_bias, *[None] * ctx.option_count


# --- fakes: shape and dtype without data ----------------------------------------------------------------------------


@torch.library.register_fake("octavo::choose_qparams")
def _(x, qmin, qmax, symmetric):
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.int32)


@torch.library.register_fake("octavo::quantize")
def _(x, scale, zero_point, qmin, qmax, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("octavo::dequantize")
def _(codes, scale, zero_point, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


@torch.library.register_fake("octavo::int8_mm")
def _(a, b):
    torch._check(
        a.shape[1] == b.shape[0], lambda: f"int8_mm: a has {a.shape[1]} columns, b has {b.shape[0]} rows"
    )
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


@torch.library.register_fake("octavo::pack_weight")
def _(codes):
    n, k = codes.shape
    packed = codes.new_empty(((n + 15) // 16, (k + 63) // 64, 16, 64))
    return packed, codes.new_empty(n, dtype=torch.int32)


@torch.library.register_fake("octavo::unpack_weight")
def _(packed, n, k):
    return packed.new_empty((n, k))


@torch.library.register_fake("octavo::linear_dynamic")
@torch.library.register_fake("octavo::linear_static")
@torch.library.register_fake("octavo::linear_weight_only")
def _(x, packed, column_sum, weight_scale, bias, *options):
    k = x.shape[-1]
    torch._check(
        (k + 63) // 64 == packed.shape[1], lambda: f"x has {k} features, packed was made for another number"
    )
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
