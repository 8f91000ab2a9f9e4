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
from .tensors.granularity import Granularity, PerChannel, PerGroup, PerTensor

_CODE_TYPES = ("int8", "uint8", "int16", "uint16")
_PLAIN = (np.ndarray, np.memmap, np.matrix)  # arrays that are their values and nothing else

__all__ = ["QuantizedArray", "dequantize", "int8_mm", "quantize"]


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """Codes and what gives them meaning: real = scale * (code - zero_point).

    codes               int8, uint8, int16 or uint16, of the real array's shape
    scale, zero_point   float32 and int32, of the shape `granularity` gives them, as in octavo.QParams
    raises              TypeError for other dtypes and kinds of array; ValueError for shapes that do not fit
    """

    codes: NDArray
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    granularity: Granularity

    def __post_init__(self):
        _check("QuantizedArray", "codes", self.codes, *_CODE_TYPES)
        _check("QuantizedArray", "scale", self.scale, "float32")
        _check("QuantizedArray", "zero_point", self.zero_point, "int32")
        expected = _check_granularity("QuantizedArray", self.granularity).qparams_shape(self.codes.shape)
        for name, array in (("scale", self.scale), ("zero_point", self.zero_point)):
            if array.shape != expected:
                raise ValueError(
                    f"QuantizedArray: {name} has shape {array.shape}, codes of shape {self.codes.shape} with "
                    f"{self.granularity} need {expected}"
                )

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
        scale, zero_point = np.asarray(self.scale).ravel(), np.asarray(self.zero_point).ravel()
        real = (_dequantize_wide if rows.itemsize > 1 else _C.dequantize)(rows, scale, zero_point)
        return _from_rows(real, self.shape, self.granularity)


def quantize(
    x: NDArray[np.float32],
    *,
    dtype: DTypeLike = np.int8,
    granularity: Granularity | type[Granularity] = PerTensor(),
    symmetric: bool = True,
) -> QuantizedArray:
    """`x` as integer codes with scales chosen from its range; the meaning of each argument is octavo.quantize's.

    x        [...] float32, finite; an ndarray, a memmap or a matrix
    dtype    int8 or uint8, or int16 or uint16, which NumPy computes
    raises   TypeError for another dtype and another kind of array, such as a masked one; ValueError for NaN or Inf, and
             for a granularity that does not fit x's shape
    source   Jacob et al. 2018 (arXiv:1712.05877), eq. 1; docs/numerics.md
    """
    _check("quantize", "x", x, "float32")
    x, dtype = np.asarray(x), np.dtype(dtype)
    if dtype.name not in _CODE_TYPES or not dtype.isnative:
        raise TypeError(f"quantize: dtype is {_name_of(dtype)}, codes are {', '.join(_CODE_TYPES)}")
    granularity = _check_granularity("quantize", granularity)
    limits = np.iinfo(dtype)
    qmin = int(limits.min) + bool(symmetric)  # one code less, so that the middle is an integer
    rows, shape = _to_rows(x, granularity), granularity.qparams_shape(x.shape)
    scale, zero_point = _C.choose_qparams(rows, qmin, int(limits.max), bool(symmetric))
    if dtype.itemsize > 1:
        codes = _quantize_wide(rows, scale, zero_point, qmin, dtype)
    else:
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
    return _C.int8_mm(np.ascontiguousarray(np.asarray(a)), np.ascontiguousarray(np.asarray(b)))


def _check(op: str, name: str, array: NDArray, *accepted: str) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{op}: {name} is a {type(array).__name__}, an ndarray is needed; for tensors see octavo.{op}"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{op}: {name} is a masked array, and its mask would be lost; fill what is masked, {name}.filled(0), or "
            f"take the rest, {name}.compressed()"
        )
    if type(array) not in _PLAIN:
        raise TypeError(
            f"{op}: {name} is a {type(array).__name__}, which may mean more than its values; use np.asarray({name}) if "
            "they are what you mean"
        )
    if array.dtype.name not in accepted or not array.dtype.isnative:
        raise TypeError(
            f"{op}: {name} is {_name_of(array.dtype)}, accepted: {', '.join(accepted)}; "
            f"use {name}.astype(np.{accepted[0]})"
        )


def _check_granularity(op: str, granularity: Granularity | type[Granularity]) -> Granularity:
    granularity = granularity() if isinstance(granularity, type) else granularity
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"{op}: granularity is {granularity!r}, accepted: PerTensor, PerChannel, PerGroup, PerToken"
        )
    return granularity


def _name_of(dtype: np.dtype) -> str:
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"


# The kernels' codes are bytes. For 16 bits the reference's operations, in its order: the same bits as octavo.quantize.


def _quantize_wide(
    rows: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int32],
    qmin: int,
    dtype: np.dtype,
) -> NDArray:
    steps = np.rint(rows * (np.float32(1) / scale)[:, None]).astype(np.float64)
    return (steps + zero_point[:, None]).clip(qmin, np.iinfo(dtype).max).astype(dtype)


def _dequantize_wide(
    codes: NDArray, scale: NDArray[np.float32], zero_point: NDArray[np.int32]
) -> NDArray[np.float32]:
    steps = codes.astype(np.int64) - zero_point.astype(np.int64)[:, None]
    return scale[:, None] * steps.astype(np.float32)


# Granularity.to_rows and from_rows for ndarrays. Not through torch.from_numpy: it refuses negative strides and warns
# about read-only memory, such as a mapped file.


def _to_rows(x: NDArray, granularity: Granularity) -> NDArray:
    x = np.asarray(x)
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
