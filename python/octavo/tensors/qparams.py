# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors: integer codes with the scale and zero point that give them meaning.

    real = scale * (code - zero_point)

A granularity (granularity.py) says which elements share one scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .. import ops
from ..base.float_types import FLOAT_DTYPES
from .fake_quantize import fake_quantize, first_weight_scale, lsq
from .granularity import Granularity, PerChannel, PerTensor, require_granularity
from .plot import Matrices, draw

_CODE_RANGES = {  # (dtype, symmetric): symmetric ranges have an integer middle, so that -x gets the mirrored code of x
    (torch.int8, True): (-127, 127),
    (torch.int8, False): (-128, 127),
    (torch.uint8, True): (1, 255),
    (torch.uint8, False): (0, 255),
    (torch.int16, True): (-32767, 32767),
    (torch.int16, False): (-32768, 32767),
    (torch.uint16, True): (1, 65535),
    (torch.uint16, False): (0, 65535),
}


@dataclass(frozen=True, eq=False)
class QParams:
    """What turns reals into codes and back.

    scale        float32 > 0, real units per step; its shape is the granularity's: [] per tensor, [C] per channel,
                 [..., ceil(K / group_size)] per group, [...] per token
    zero_point   int32, same shape: the code that means 0.0
    qmin, qmax   the codes in use; the smallest of int8, uint8, int16 and uint16 holds them
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int
    granularity: Granularity

    formula: ClassVar[str] = "scale * (code - zero_point)"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        if self.qmin < 0:
            return torch.int8 if -128 <= self.qmin and self.qmax <= 127 else torch.int16
        return torch.uint8 if self.qmax <= 255 else torch.uint16

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + self.zero_point.nbytes

    @property
    def words(self) -> str:
        """Which codes there are, for people."""
        return f"codes {self.qmin} .. {self.qmax}"

    def quantize(self, x: torch.Tensor) -> QuantizedTensor:
        """`x` as codes of these qparams; values out of range take the nearest code, NaN takes zero_point.

        raises   TypeError for another dtype than float32, bfloat16, float16; ValueError for a shape that does not fit
        source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1
        """
        x = _check_x("QParams.quantize", x)
        expected = self.granularity.qparams_shape(x.shape)
        if expected != tuple(self.scale.shape):
            raise ValueError(
                f"QParams.quantize: x of shape {tuple(x.shape)} needs scales of shape {expected} with "
                f"{self.granularity}, these qparams have {tuple(self.scale.shape)}; choose qparams for x"
            )
        codes = self.quantize_rows(self.granularity.to_rows(x))
        return QuantizedTensor(self.granularity.from_rows(codes, x.shape), self)

    # Rows, as the granularity makes them: one for each scale. Other kinds of codes differ in these and nothing else.

    def quantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The codes of `rows`."""
        scale, zero_point = self.scale.reshape(-1), self.zero_point.reshape(-1)
        return ops.quantize(rows, scale, zero_point, self.qmin, self.qmax, self.dtype)

    def dequantize_rows(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `codes` stand for."""
        return ops.dequantize(codes, self.scale.reshape(-1), self.zero_point.reshape(-1), dtype)

    def steps(self, codes: torch.Tensor) -> torch.Tensor:
        """The same in units of the scales."""
        return codes.long() - self.zero_point.reshape(-1, 1)

    def nearest_(self, columns: torch.Tensor) -> torch.Tensor:
        """`columns` float [columns, rows], in units of the scales, becomes the values nearest to it that codes have, in
        the same units and in place."""
        zero_point = self.zero_point.reshape(-1)
        return columns.round_().clamp_(self.qmin - zero_point, self.qmax - zero_point)

    def part(self, rows: slice) -> QParams:
        """These qparams for some of the rows, each of which then counts as a channel."""
        scale, zero_point = self.scale.reshape(-1)[rows], self.zero_point.reshape(-1)[rows]
        return replace(self, scale=scale, zero_point=zero_point, granularity=PerChannel(0))

    def fake_quantize_rows(self, rows: torch.Tensor, estimator: str) -> torch.Tensor:
        """What the codes of `rows` stand for, in the dtype of `rows`, which a gradient reaches."""
        scale, zero_point = self.scale.reshape(-1), self.zero_point.reshape(-1)
        return fake_quantize(rows, scale, zero_point, self.qmin, self.qmax, estimator=estimator)

    def learned_rows(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The same with scales [rows] that learn; those of these qparams do not count."""
        return lsq(rows, scale, self.qmin, self.qmax)

    def first_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """The scales [rows] that training starts from, if these qparams cover the range of `rows`."""
        return first_weight_scale(rows, self.scale.reshape(-1), self.qmin, self.qmax)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.granularity}, {self.words}, scale {_span(self.scale)})"


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes, of the dtype that qparams name and in the shape of the real tensor; dequantize it to compute with it."""

    codes: torch.Tensor
    qparams: QParams

    @property
    def scale(self) -> torch.Tensor:
        return self.qparams.scale

    @property
    def zero_point(self) -> torch.Tensor:
        return self.qparams.zero_point

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and zero_point together."""
        return self.codes.nbytes + self.qparams.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """scale * (codes - zero_point), or scale * value of a codebook, rounded once to float32 and then to `dtype`
        (float32, bfloat16, float16)."""
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dequantize: dtype is {dtype}, accepted are float32, bfloat16 and float16")
        granularity = self.qparams.granularity
        rows = self.qparams.dequantize_rows(granularity.to_rows(self.codes), dtype)
        return granularity.from_rows(rows, self.shape)

    def plot(self, x: torch.Tensor, *, max_rows: int = 8, max_columns: int = 8) -> Any:
        """A matplotlib Figure: `x`, its codes with their scales, what comes back, and the error in each cell.

        x        what was quantized, of the same shape. Of a large one the top left corner is shown, which the figure
                 says; axes before the last count as rows
        raises   ValueError if the shapes differ, x is empty or a limit is not positive; ImportError without matplotlib
        """
        x = _check_x("QuantizedTensor.plot", x)
        if x.shape != self.shape or not x.numel():
            raise ValueError(
                f"QuantizedTensor.plot: x has shape {list(x.shape)}, these codes {list(self.shape)}; "
                "give the tensor that was quantized, not an empty one"
            )
        if max_rows < 1 or max_columns < 1:
            raise ValueError(
                f"QuantizedTensor.plot: at least 1 row and column, got {max_rows} and {max_columns}"
            )
        columns = x.shape[-1] if x.dim() else 1
        granularity = self.qparams.granularity
        steps = granularity.from_rows(self.qparams.steps(granularity.to_rows(self.codes)), self.shape)
        scale, zero_point = self._spread(self.scale), self._spread(self.zero_point)
        tensors = (x, self.codes, steps, self.dequantize(), scale, zero_point)
        matrices = Matrices(*(tensor.reshape(-1, columns) for tensor in tensors))
        return draw(matrices, self.qparams.formula, max_rows, max_columns)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Each element's own scale or zero point, in the tensor's shape."""
        granularity = self.qparams.granularity
        rows = granularity.to_rows(self.codes)
        return granularity.from_rows(values.reshape(-1, 1).expand(rows.shape), self.shape)

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape {list(self.shape)}, {str(self.codes.dtype).removeprefix('torch.')}, "
            f"{self.qparams.granularity}, {self.qparams.words}, "
            f"scale {_span(self.scale)}, {self.nbytes:,} bytes)"
        )


def choose_qparams(
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    granularity: Granularity | type[Granularity] = PerTensor(),
    symmetric: bool = True,
) -> QParams:
    """Scale and zero point that cover the range of `x`, 0 included.

    x        [...] float32, bfloat16 or float16, finite
    dtype    of the codes, int8 or uint8. Symmetric codes are -127 .. 127 around 0, or 1 .. 255 around 128 (uint8);
             affine ones are -128 .. 127 or 0 .. 255 with a zero_point of their own for each scale. int16 and uint16
             likewise, for exchange with other programs: no layer multiplies them
    raises   TypeError for other dtypes; ValueError for NaN or Inf, and for a granularity that does not fit x's shape
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; symmetric: scale = max|x| / 127, never 127.5, so that the
             largest value comes back exactly
    """
    x = _check_x("choose_qparams", x)
    granularity = require_granularity(granularity)
    if (dtype, bool(symmetric)) not in _CODE_RANGES:
        raise TypeError(f"choose_qparams: dtype is {dtype}, codes are torch.int8, uint8, int16 or uint16")
    qmin, qmax = _CODE_RANGES[dtype, bool(symmetric)]
    scale, zero_point = ops.choose_qparams(granularity.to_rows(x), qmin, qmax, bool(symmetric))
    shape = granularity.qparams_shape(x.shape)
    return QParams(scale.reshape(shape), zero_point.reshape(shape), qmin, qmax, granularity)


def quantize(
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    granularity: Granularity | type[Granularity] = PerTensor(),
    symmetric: bool = True,
) -> QuantizedTensor:
    """`x` as integer codes with qparams chosen from its range: `choose_qparams(x, ...).quantize(x)`.

    x        [...] float32, bfloat16 or float16, finite; any strides
    returns  QuantizedTensor; inside the range |dequantized - x| <= scale / 2 (1 + 2^-13); the 2^-13 is
             what float32 may round on the way, and 2^-5 with 65,535 codes
    raises   as choose_qparams
    """
    return choose_qparams(x, dtype=dtype, granularity=granularity, symmetric=symmetric).quantize(x)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`q.dequantize(dtype)`."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(
            f"dequantize: q must be a QuantizedTensor, as octavo.quantize returns it, got {type(q).__name__}"
        )
    return q.dequantize(dtype)


def _check_x(who: str, x: torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch.nn.Module):
        raise TypeError(
            f"{who}: x is a model, {type(x).__name__}, and a tensor is needed; octavo.quantize_(model, scheme) "
            "quantizes the layers of a model, octavo.quantized(model, scheme) those of a copy"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{who}: x must be a torch.Tensor, got {type(x).__name__}; for ndarrays see octavo.numpy"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{who}: x is {x.dtype}, accepted are float32, bfloat16 and float16; use x.float()")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{who}: x must be a dense tensor, got {x.layout}; use x.to_dense()")
    return x.detach()


def _span(scale: torch.Tensor) -> str:
    if scale.is_meta or scale.numel() == 0:
        return "of " + str(list(scale.shape))
    low, high = scale.aminmax()
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
