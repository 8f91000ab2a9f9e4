# SPDX-License-Identifier: Apache-2.0
"""The same on ndarrays: quantize, dequantize, int8_mm, through pybind11 and the same kernels and threads.

Contiguous float32 input is read where it lies, nothing is copied; the GIL is released meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _C
from .qparams import Granularity, PerChannel, PerGroup, PerTensor

__all__ = ["QuantizedArray", "dequantize", "int8_mm", "quantize"]


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """Codes (int8 or uint8, of the real array's shape) and what gives them meaning: real = scale * (code - zero_point).

    scale, zero_point   float32 and int32, of the shape `granularity` gives them, as in octavo.QParams
    """

    codes: NDArray
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    granularity: Granularity

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and zero_point together."""
        return self.codes.nbytes + self.scale.nbytes + self.zero_point.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        """scale * (codes - zero_point), float32."""
        rows = _to_rows(self.codes, self.granularity)
        return _from_rows(
            _C.dequantize(rows, self.scale.ravel(), self.zero_point.ravel()), self.shape, self.granularity
        )


def quantize(
    x: NDArray[np.float32],
    *,
    dtype: DTypeLike = np.int8,
    granularity: Granularity | type[Granularity] = PerTensor(),
    symmetric: bool = True,
) -> QuantizedArray:
    """`x` as integer codes with scales chosen from its range; the meaning of each argument is octavo.quantize's.

    x        [...] float32, finite
    raises   TypeError for another dtype; ValueError for NaN or Inf, and for a granularity that does not fit x's shape
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    _check("quantize", "x", x, "float32")
    if np.dtype(dtype).name not in ("int8", "uint8"):
        raise TypeError(f"quantize: dtype is {np.dtype(dtype).name}, codes are int8 or uint8")
    granularity = granularity() if isinstance(granularity, type) else granularity
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"quantize: granularity is {granularity!r}, accepted: PerTensor, PerChannel, PerGroup, PerToken"
        )
    limits = np.iinfo(np.dtype(dtype))
    qmin = int(limits.min) + bool(symmetric)  # one code less, so that the middle is an integer
    rows, shape = _to_rows(x, granularity), granularity.qparams_shape(x.shape)
    scale, zero_point = _C.choose_qparams(rows, qmin, int(limits.max), bool(symmetric))
    codes = _C.quantize(rows, scale, zero_point, qmin, int(limits.max), limits.min < 0)
    return QuantizedArray(
        _from_rows(codes, x.shape, granularity), scale.reshape(shape), zero_point.reshape(shape), granularity
    )


def dequantize(q: QuantizedArray) -> NDArray[np.float32]:
    """`q.dequantize()`."""
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"dequantize: q is a {type(q).__name__}, a QuantizedArray is needed, as quantize returns it"
        )
    return q.dequantize()


def int8_mm(a: NDArray, b: NDArray[np.int8]) -> NDArray[np.int32]:
    """a @ b, exact.

    a        [m, k] int8 or uint8; b [k, n] int8; k at most 65,793
    returns  [m, n] int32
    raises   TypeError for another dtype; ValueError for shapes that do not fit and a longer k
    source   ours
    """
    _check("int8_mm", "a", a, "int8", "uint8")
    _check("int8_mm", "b", b, "int8")
    return _C.int8_mm(np.ascontiguousarray(a), np.ascontiguousarray(b))


def _check(op: str, name: str, array: NDArray, *accepted: str) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{op}: {name} is a {type(array).__name__}, an ndarray is needed; for tensors see octavo.{op}"
        )
    if array.dtype.name not in accepted or not array.dtype.isnative:
        order = "" if array.dtype.isnative else "byte-swapped "
        raise TypeError(
            f"{op}: {name} is {order}{array.dtype.name}, accepted: {', '.join(accepted)}; "
            f"use {name}.astype(np.{accepted[0]})"
        )


# Granularity.to_rows and from_rows for ndarrays. Not through torch.from_numpy: it refuses negative strides and warns
# about read-only memory, such as a mapped file.


def _to_rows(x: NDArray, granularity: Granularity) -> NDArray:
    rows = math.prod(granularity.qparams_shape(x.shape))
    if isinstance(granularity, PerChannel):
        x = np.moveaxis(x, granularity.axis, 0)
    elif isinstance(granularity, PerGroup) and (tail := -x.shape[-1] % granularity.group_size):
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tail)])
    return np.ascontiguousarray(x.reshape(rows, x.size // rows if rows else 0))


def _from_rows(rows: NDArray, shape: Sequence[int], granularity: Granularity) -> NDArray:
    if isinstance(granularity, PerChannel):
        others = list(shape)
        channels = others.pop(granularity.axis)
        return np.ascontiguousarray(np.moveaxis(rows.reshape(channels, *others), 0, granularity.axis))
    if isinstance(granularity, PerGroup):
        padded = granularity.qparams_shape(shape)[-1] * granularity.group_size
        return np.ascontiguousarray(rows.reshape(*shape[:-1], padded)[..., : shape[-1]])
    return rows.reshape(shape)
