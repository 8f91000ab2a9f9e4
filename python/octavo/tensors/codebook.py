# SPDX-License-Identifier: Apache-2.0
"""Codebooks: four bits are an index into a table of sixteen values, which lie closer where weights are more frequent.

    real = scale * values[code]

The tables are those of other programs, value by value. docs/numerics.md, eq. 80 and 81, has their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch

from ..reference import SMALLEST_SCALE
from .fake_quantize import scaled_gradient, straight_through
from .granularity import Granularity, PerChannel
from .qparams import QParams

SMALLEST_DIVISOR = 1e-38  # its inverse is finite; bitsandbytes has the same


@dataclass(frozen=True)
class Codebook:
    """Sixteen values, in units of a block's scale.

    name       as people call it
    values     of the codes 0 .. 15
    ties       what a number halfway between two values becomes: the lower one, the higher one, the one nearer to zero
    integers   what kernels multiply by, from 7 bits plus an `offset`: integers[code] * step is values[code], exactly or
               as nearly as the comment at the table says
    step       the value of an integer of 1
    """

    name: str
    values: tuple[float, ...]
    ties: Literal["lower", "higher", "zero"]
    integers: tuple[int, ...]
    step: float

    @cached_property
    def table(self) -> torch.Tensor:
        """`values` as float32 [16]."""
        return torch.tensor(self.values, dtype=torch.float32, device="cpu")

    @cached_property
    def zero(self) -> int:
        """The code of 0.0."""
        return int(self.nearest(torch.zeros(1, device="cpu")))

    @property
    def offset(self) -> int:
        """What makes `integers` unsigned."""
        return -min(self.integers)

    @cached_property
    def unsigned(self) -> torch.Tensor:
        """`integers` plus the offset, uint8 [16]."""
        unsigned = [integer + self.offset for integer in self.integers]
        return torch.tensor(unsigned, dtype=torch.uint8, device="cpu")

    @property
    def largest(self) -> float:
        return max(map(abs, self.values))

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The codes, uint8, of the values that are nearest to `x` float32, of any shape. NaN gets that of 0.0."""
        codes, thresholds = (each.to(x.device) for each in self._ascending)
        return codes[torch.bucketize(torch.nan_to_num(x).contiguous(), thresholds, out_int32=True)]

    def covers(self, x: torch.Tensor) -> torch.Tensor:
        """Where `x` is not clipped: it lies beyond the last value by half a step at most, as integers have it."""
        _, thresholds = (each.to(x.device) for each in self._ascending)
        low, high = 2 * min(self.values) - thresholds[0], 2 * max(self.values) - thresholds[-1]
        return (x >= low) & (x <= high)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of `codes`, float32, of any shape."""
        return self.table.to(codes.device)[codes.int()]

    @cached_property
    def _ascending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes in the order of their values, and where one ends and the next begins: x belongs to code i if
        thresholds[i - 1] < x <= thresholds[i]."""
        values = self.table
        codes = values.argsort(stable=True)
        if (
            self.ties == "zero"
        ):  # of two zeros the first alone; with bitsandbytes a tie between them has a meaning
            codes = codes[torch.cat([torch.ones(1, dtype=torch.bool), values[codes].diff() > 0])]
        middle = (values[codes][1:] + values[codes][:-1]) / 2
        goes_up = {"lower": middle.isnan(), "higher": middle.isfinite(), "zero": middle < 0}[self.ties]
        below = middle.nextafter(torch.full_like(middle, -math.inf))
        return codes.to(torch.uint8), torch.where(goes_up, below, middle)


@dataclass(frozen=True, eq=False, repr=False)
class CodebookQParams(QParams):
    """What turns reals into codes of a codebook and back. `codebook_qparams` makes them.

    scale      float32, finite: what a value of 1.0 stands for
    zero_point   the code of 0.0, the same for all
    stored     the scales as files have them, by name; None: nobody has asked the format yet
    divisor    what reals are divided by before the nearest value is looked up, of scale's shape. It is not the scale
               where scales are rounded after the codes have been chosen

    The last two belong to one scale: `dataclasses.replace` leaves them behind.
    """

    codebook: Codebook
    stored: Mapping[str, torch.Tensor] | None = field(init=False, default=None)
    divisor: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisor", self.scale)

    formula: ClassVar[str] = "scale * values[code]"

    @property
    def nbytes(self) -> int:
        """Of the scales as files have them."""
        return self.scale.nbytes if self.stored is None else sum(each.nbytes for each in self.stored.values())

    @property
    def words(self) -> str:
        return f"codes of {self.codebook.name}"

    def quantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.codebook.nearest(rows.float() * _inverse(self.divisor.reshape(-1, 1)))

    def dequantize_rows(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (self.codebook.lookup(codes) * self.scale.reshape(-1, 1)).to(dtype)

    def steps(self, codes: torch.Tensor) -> torch.Tensor:
        return self.codebook.lookup(codes)

    def nearest_(self, columns: torch.Tensor) -> torch.Tensor:
        return columns.copy_(self.codebook.lookup(self.codebook.nearest(columns)))

    def part(self, rows: slice) -> CodebookQParams:
        scale, divisor = self.scale.reshape(-1)[rows], self.divisor.reshape(-1)[rows]
        return codebook_qparams(self.codebook, scale, PerChannel(0), divisor=divisor)

    def fake_quantize_rows(self, rows: torch.Tensor, estimator: str) -> torch.Tensor:
        x = rows.detach().float() * _inverse(self.divisor.reshape(-1, 1))
        within = self.codebook.covers(x) if estimator == "clipped" else None
        values = self.codebook.lookup(self.codebook.nearest(x)) * self.scale.reshape(-1, 1)
        return straight_through(rows, values.to(rows.dtype), within)

    def learned_rows(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As `lsq`, with the values of the table in the place of whole steps: docs/numerics.md, eq. 85."""
        factor = 1 / math.sqrt(max(rows.shape[1], 1) * self.codebook.largest)
        positive = scaled_gradient(scale, factor).abs().clamp_min(SMALLEST_SCALE)[:, None]
        x = rows.float() / positive
        nearest = self.codebook.nearest(rows.detach().float() * _inverse(positive.detach()))
        values = straight_through(x, self.codebook.lookup(nearest), self.codebook.covers(x.detach()))
        return (values * positive).to(rows.dtype)

    def first_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Those that cover the range."""
        return self.scale.reshape(-1).clamp_min(SMALLEST_SCALE)


def codebook_qparams(
    codebook: Codebook,
    scale: torch.Tensor,
    granularity: Granularity,
    stored: Mapping[str, torch.Tensor] | None = None,
    divisor: torch.Tensor | None = None,
) -> CodebookQParams:
    """CodebookQParams with these fields; without a divisor it is the scale."""
    zero = torch.full((), codebook.zero, dtype=torch.int32, device=scale.device).expand(scale.shape)
    q = CodebookQParams(scale, zero, 0, 15, granularity, codebook)
    object.__setattr__(q, "stored", stored)
    if divisor is not None:
        object.__setattr__(q, "divisor", divisor)
    return q


def _inverse(divisor: torch.Tensor) -> torch.Tensor:
    """0 where `divisor` is 0: a scale that has vanished leaves zeros."""
    return torch.where(divisor > 0, 1 / divisor.clamp_min(SMALLEST_DIVISOR), 0.0)


def _rounded(values: tuple[float, ...], steps: int) -> tuple[int, ...]:
    return tuple(round(value * steps) for value in values)


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Quantiles of a normal distribution, 0 among them. Its integers differ from 63 * value by at most a half: the rounding
# error of Gaussian weights in blocks of 64 grows from 20.73 to 20.69 dB. Of 64 steps 1.0 would not fit 7 bits.
# Source: Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3; the values are bitsandbytes' (0.50).
NF4_VALUES = Codebook("NF4", _NF4, "lower", _rounded(_NF4, 63), 1 / 63)

_TWELFTHS = (0, 0, 8, 12, 4, 6, 2, 3, 0, 0, -8, -12, -4, -6, -2, -3)
# bitsandbytes' 4-bit float, by code: not e2m1. Integers are exact, but +-1/192 becomes 0, off by 0.5 % of the scale.
# Source: bitsandbytes 0.50, whose tie between 0 and -0 gives small positive numbers the code 8.
FP4_VALUES = Codebook("FP4", (*_FP4, 0.0, *(-value for value in _FP4[1:])), "lower", _TWELFTHS, 1 / 12)

# A sign, two bits of exponent, one of fraction. Integers are exact.
# Source: OCP Microscaling Formats 1.0, section 5.3.3; ties as in ggml.
_E2M1_SIGNED = (*_E2M1, *(-value for value in _E2M1))
E2M1_VALUES = Codebook("e2m1", _E2M1_SIGNED, "zero", _rounded(_E2M1_SIGNED, 2), 0.5)

# Of ggml's IQ4_NL and IQ4_XS. Its integers take 8 bits: a kernel of 7-bit codes splits them.
# Source: ggml, `kvalues_iq4nl`.
IQ4_NL_VALUES = Codebook("IQ4_NL", tuple(map(float, _IQ4_NL)), "higher", _IQ4_NL, 1.0)
