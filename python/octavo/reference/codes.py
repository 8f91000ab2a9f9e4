# SPDX-License-Identifier: Apache-2.0
"""The integer operators, bit for bit; a norm before or an activation after them within the bounds of those."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .floats import activate, add_norm

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # 2^-126: below it 1 / scale is not finite
MAX_EXACT_K = 65793  # the longest k whose uint8 x int8 sum fits int32: 255 * 128 * 65,793 = 2^31 - 128
MAX_16 = 127 * 256  # 16-bit activations have a high byte within [-127, 127]


def choose_qparams(
    x: torch.Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every row of `x`, so that the row's range fits [qmin, qmax] and 0 is a code.

    x        [rows, columns] float32, bfloat16 or float16
    returns  scale float32 [rows], zero_point int32 [rows]
    raises   ValueError for a row with NaN or Inf, and for a symmetric range without an integer middle
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1
    """
    x = x.float()
    finite = x.isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"choose_qparams: row {int((~finite).nonzero()[0])} of x holds NaN or Inf; "
            "finite values are needed"
        )
    if symmetric:
        return _symmetric_qparams(x, qmin, qmax)
    return _affine_qparams(x, qmin, qmax)


def _symmetric_qparams(x: torch.Tensor, qmin: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    if (qmin + qmax) % 2:
        raise ValueError(
            f"choose_qparams: symmetric needs qmin + qmax even, got {qmin} and {qmax}; "
            "use [-127, 127] or [1, 255], or symmetric=False"
        )
    middle = (qmin + qmax) // 2
    scale = _row_max(x.abs()) / (qmax - middle)
    scale = torch.where(scale < SMALLEST_SCALE, 1.0, scale)
    return scale, torch.full_like(scale, middle, dtype=torch.int32)


def _affine_qparams(x: torch.Tensor, qmin: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    # 0 is always inside the range: without it [1, 2] would need the zero_point -255.
    low, high = -_row_max(-x), _row_max(x)
    steps = qmax - qmin
    scale = (high - low) / steps
    scale = torch.where(scale.isfinite(), scale, high / steps - low / steps)  # high - low may overflow
    tiny = scale < SMALLEST_SCALE
    scale = torch.where(tiny, 1.0, scale)
    zero_point = torch.where(tiny, 0, qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def _row_max(x: torch.Tensor) -> torch.Tensor:
    """max(row, 0) of every row; 0 for a row without elements."""
    return F.pad(x, (0, 1)).amax(1)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, dtype: torch.dtype
) -> torch.Tensor:
    """Codes: clamp(round_half_even(x * (1 / scale)) + zero_point, qmin, qmax). NaN becomes zero_point.

    x        [rows, columns] float32, bfloat16 or float16; scale float32 [rows], zero_point int32 [rows]
    returns  [rows, columns], `dtype` int8, uint8, int16 or uint16
    """
    zero_point = zero_point.double()[:, None]
    # In double: adding zero_point must not round again.
    steps = torch.round(x.float() * (1 / scale)[:, None]).double()
    return (steps.nan_to_num(nan=0.0) + zero_point).clamp(qmin, qmax).to(dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Real values: scale * (code - zero_point), rounded to float32 and then to `dtype`.

    codes    [rows, columns] int8, uint8, int16 or uint16; scale float32 [rows], zero_point int32 [rows]
    """
    steps = codes.long() - zero_point.long()[:, None]
    return (scale[:, None] * steps.float()).to(dtype)


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, exact.

    a        [m, k] int8 or uint8; b [k, n] int8
    returns  [m, n] int32
    raises   ValueError for k > 65,793, where a sum may leave int32
    """
    if a.shape[1] > MAX_EXACT_K:
        raise ValueError(
            f"int8_mm: k is {a.shape[1]}, at most {MAX_EXACT_K} is exact in int32; split k and add in int64"
        )
    return (a.long() @ b.long()).to(torch.int32)


def pack_weight(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' layout, drawn in docs/packed_format.md: strips of 16 rows, tiles of 64 k, lines of 4 k.

    codes    [n, k] int8
    returns  packed int8 [ceil(n / 16), ceil(k / 64), 16, 64], padded with zeros, and column_sum int32 [n], the sum
             of each row's codes over k (a row of the weight is a column of the product)
    """
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % 64, 0, -n % 16))
    strips, tiles = padded.shape[0] // 16, padded.shape[1] // 64
    by_column = padded.reshape(strips, 16, tiles, 16, 4)  # strip, column, tile, line, k mod 4
    packed = by_column.permute(0, 2, 3, 1, 4).reshape(strips, tiles, 16, 64).contiguous()
    return packed, codes.sum(1, dtype=torch.int64).to(torch.int32)


def pack_weight_into(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`pack_weight` into `packed`; returns column_sum."""
    result, column_sum = pack_weight(codes)
    packed.copy_(result)
    return column_sum


def list_saturating(packed: torch.Tensor, column_sum: torch.Tensor) -> torch.Tensor:
    """`column_sum`, and behind it the words of four codes that hold a pair of neighbours whose sum is beyond 128, in
    which vpmaddubsw can saturate. An operator leaves the list out where it is of no use.

    returns  int32: the sums; how many words are listed in front of each strip and in all; two words in each value
    """
    strips = packed.shape[0]
    pairs = packed.reshape(strips, -1, 2, 2).int().sum(-1)  # strip, word, pair
    strip, word = (pairs.abs() > 128).any(-1).nonzero(as_tuple=True)
    offsets = F.pad(torch.bincount(strip, minlength=strips).cumsum(0), (1, 0)).to(torch.int32)
    words = F.pad(word.to(torch.int32), (0, len(word) % 2)).reshape(-1, 2)
    return torch.cat([column_sum, offsets, words[:, 0] | words[:, 1] << 16])


def unpack_weight(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The codes [n, k] that `pack_weight` was given."""
    strips, tiles = packed.shape[:2]
    by_line = packed.reshape(strips, tiles, 16, 16, 4)  # strip, tile, line, column, k mod 4
    return by_line.permute(0, 3, 1, 2, 4).reshape(strips * 16, tiles * 64)[:n, :k].contiguous()


def linear_dynamic(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    symmetric: bool,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights; every row of `x` is quantized to uint8 on its own, in the call.

    x        [..., k] float32, bfloat16 or float16; weight_scale float32 [n, 1]; bias [n] or None
    returns  [..., n] in x's dtype; a row of x with NaN or Inf gives a row of NaN and touches no other row
    source   per-token activations: Yao et al. 2022 (arXiv:2206.01861), section 4.1
    """
    rows, finite = _finite_rows(x)
    qmin, qmax = (1, 255) if symmetric else (0, 255)
    scale, zero_point = choose_qparams(rows, qmin, qmax, symmetric)
    codes = quantize(rows, scale, zero_point, qmin, qmax, torch.uint8).long()
    weight = unpack_weight(packed, weight_scale.shape[0], x.shape[-1]).long()
    total = codes @ weight.T - zero_point.long()[:, None] * column_sum[: len(weight)].long()
    y = _epilogue(total.float(), scale, finite, weight_scale, bias)
    return _finish(y, activation, x)


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
    """x @ weight.T + bias with int8 weights and one scale for all of `x`, known beforehand.

    x        [..., k] float32, bfloat16 or float16; input_scale float32 [1]; input_zero_point int32 [1]
    bias     [n], None, or int32 [n]: in steps of input_scale * weight_scale, part of the exact sum
    returns  [..., n] in x's dtype; a row of x with NaN or Inf gives a row of NaN and touches no other row
    raises   ValueError for an int32 bias with which a sum could leave int32
    source   Jacob et al. 2018 (arXiv:1712.05877), section 2
    """
    rows, finite = _finite_rows(x)
    scale, zero_point = input_scale.expand(len(rows)), input_zero_point.expand(len(rows))
    codes = quantize(rows, scale, zero_point, -128, 127, torch.int8).long()
    weight = unpack_weight(packed, weight_scale.shape[0], x.shape[-1]).long()
    total = codes @ weight.T - zero_point.long()[:, None] * column_sum[: len(weight)].long()
    if bias is not None and bias.dtype == torch.int32:
        room = 2**31 - 1 - 255 * 128 * x.shape[-1]
        if (bias.long().abs() > room).any():
            raise ValueError(f"linear_static: sums leave room for an int32 bias of at most {room}")
        total, bias = total + bias.long(), None
    y = _epilogue(total.float(), scale, finite, weight_scale, bias)
    return _finish(y, activation, x)


def linear_weight_only(
    x: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias with int8 weights and nearly exact activations: every row becomes integers of 16 bits.

    They lie in [-32512, 32512], so that their high bytes lie in [-127, 127]: the kernels multiply bytes.
    x        [..., k] float32, bfloat16 or float16; weight_scale float32 [n, 1]; bias [n] or None
    returns  [..., n] in x's dtype; a row of x with NaN or Inf gives a row of NaN and touches no other row
    source   ours
    """
    rows, finite = _finite_rows(x)
    scale, _ = choose_qparams(rows, -MAX_16, MAX_16, True)
    codes = torch.round(rows * (1 / scale)[:, None]).clamp(-MAX_16, MAX_16).long()
    weight = unpack_weight(packed, weight_scale.shape[0], x.shape[-1]).long()
    y = _epilogue((codes @ weight.T).float(), scale, finite, weight_scale, bias)
    return _finish(y, activation, x)


def linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    packed: torch.Tensor,
    column_sum: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
) -> torch.Tensor:
    """`linear_dynamic`, symmetric, of rows that are codes already.

    codes    uint8 [..., k], 1 .. 255 around 128; scale float32 [rows]
    returns  [..., n] float32; a row with the scale NaN gives a row of NaN
    """
    weight = unpack_weight(packed, weight_scale.shape[0], codes.shape[-1]).long()
    total = (
        codes.reshape(len(scale), codes.shape[-1]).long() @ weight.T - 128 * column_sum[: len(weight)].long()
    )
    y = _epilogue(total.float(), scale, scale.isfinite(), weight_scale, bias)
    return _finish(y, activation, codes.float())


def add_norm_codes(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool = False,
    keep_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """add_norm, and y's codes 1 .. 255 and scale [rows]; a row that is not finite has the scale NaN and codes 0."""
    y, total = add_norm(x, residual, weight, bias, eps, rms, keep_sum)
    rows, finite = _finite_rows(y)
    scale, zero_point = choose_qparams(rows, 1, 255, True)
    codes = quantize(rows, scale, zero_point, 1, 255, torch.uint8)
    codes = torch.where(finite[:, None], codes, 0).reshape(y.shape)
    return y, total, codes, torch.where(finite, scale, torch.nan)


def _finite_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` as float32 [m, k] with its non-finite rows zeroed, and which rows are finite."""
    k = x.shape[-1]
    rows = (
        x.reshape(x.numel() // k, k).float()
        if k
        else x.new_zeros(x.shape[:-1].numel(), 0, dtype=torch.float32)
    )
    finite = rows.isfinite().all(1)
    return torch.where(finite[:, None], rows, 0.0), finite


def _epilogue(
    total: torch.Tensor,
    row_scale: torch.Tensor,
    finite: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """fma(total, row_scale * weight_scale, bias), NaN for the rows that are not finite; float32."""
    scale = row_scale[:, None] * weight_scale.reshape(1, -1)
    y = fma(total, scale, torch.zeros(()) if bias is None else bias.float())
    return torch.where(finite[:, None], y, torch.nan)


def _finish(y: torch.Tensor, activation: str | None, x: torch.Tensor) -> torch.Tensor:
    """The activation, in float32, and then x's dtype and shape."""
    if activation is not None:
        y = activate(y, activation)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[1])


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of float32 tensors with one rounding, as the CPU's fused multiply-add does it.

    torch has no fma. In float64 the product is exact, but the sum is rounded to 53 bits and then again to 24, and where
    the first rounding lands on a tie of the second the result differs from an fma. So the first rounding is made to
    odd: if the sum was inexact (its error is known exactly) and its last bit is 0, take the neighbour on the error's
    side, whose last bit is 1. An odd last bit is never a tie of 24 bits, so the second rounding decides rightly.
    source   TwoSum: Knuth, TAOCP 2, 4.2.2; rounding to odd: Boldo and Melquiond 2008 (doi:10.1109/TC.2007.70819)
    """
    product, c = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    is_even = total.view(torch.int64) & 1 == 0
    neighbour = torch.nextafter(total, error * torch.inf)
    return torch.where((error != 0) & is_even & total.isfinite(), neighbour, total).float()
