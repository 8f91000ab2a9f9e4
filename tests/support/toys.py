# SPDX-License-Identifier: Apache-2.0
"""A toy on each axis: a weight format, activations, methods and a scheme, each as a user of octavo would add one.

None of them needs an edit of the package. The format is as far from Int8 as it can be: codes of 4 bits, two in a byte,
under another name, with several scales for each row and perhaps zero points, and no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

import octavo
from octavo import ops
from octavo.activations import Activations
from octavo.base.float_types import FLOAT_DTYPES
from octavo.formats import WeightFormat
from octavo.methods import Method
from octavo.nn import PreparedLinear
from octavo.schemes import Scheme
from octavo.tensors.fake_quantize import fake_quantize
from octavo.tensors.forms import TensorForm, positive
from octavo.tensors.granularity import PerGroup
from octavo.tensors.qparams import QParams, QuantizedTensor


@dataclass(frozen=True)
class Group4(WeightFormat):
    """4 bits and a scale for each `group_size` neighbours in a row; the last group of a row may be shorter.

    `weight_packed` uint8 [n, ceil(k / 2)], the first of two codes in the low half; `weight_scale` float32 [n, groups];
    unless symmetric, `weight_zero_point` uint8 [n, groups].
    """

    group_size: int = 8
    symmetric: bool = True

    replaced: ClassVar[tuple[str, ...]] = ("weight_packed",)

    @property
    def granularity(self) -> PerGroup:
        return PerGroup(self.group_size)

    @property
    def bits(self) -> int:
        return 4

    @property
    def stored_bits(self) -> int:
        return 4

    @property
    def has_zero_points(self) -> bool:
        return not self.symmetric

    @property
    def _range(self) -> tuple[int, int]:
        return (-7, 7) if self.symmetric else (0, 15)

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        groups = self.granularity.qparams_shape((n, k))
        forms = {
            "weight_packed": TensorForm((n, -(-k // 2)), torch.uint8, (torch.uint8,)),
            "weight_scale": TensorForm(groups, torch.float32, FLOAT_DTYPES, 1.0, positive),
        }
        if not self.symmetric:
            forms["weight_zero_point"] = TensorForm(groups, torch.uint8, (torch.uint8,))
        return forms

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        codes = F.pad((q.codes.int() - self._range[0]).to(torch.uint8), (0, q.shape[1] % 2))
        tensors = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": q.scale}
        return tensors if self.symmetric else {**tensors, "weight_zero_point": q.zero_point.to(torch.uint8)}

    def read(self, tensors: Mapping[str, torch.Tensor], n: int, k: int) -> QuantizedTensor:
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        (low, high), zero = self._range, tensors.get("weight_zero_point", torch.zeros_like(scale))
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :k].int() + low
        q = QParams(scale, zero.int(), low, high, self.granularity)
        return QuantizedTensor(codes.to(q.dtype), q)

    def qparams(self, weight: torch.Tensor) -> QParams:
        low, high = self._range
        scale, zero_point = ops.choose_qparams(self.granularity.to_rows(weight), low, high, self.symmetric)
        shape = self.granularity.qparams_shape(weight.shape)
        return QParams(scale.reshape(shape), zero_point.reshape(shape), low, high, self.granularity)


@dataclass(frozen=True)
class FourBits(Activations):
    """Four bits with a scale for each row: x is rounded to -7 .. 7 steps. No kernel multiplies them."""

    def fake_quantize(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale, zero_point = ops.choose_qparams(rows.detach(), -7, 7, True)
        return fake_quantize(rows, scale, zero_point, -7, 7, estimator="pure").reshape(x.shape)


@dataclass(frozen=True)
class ToyScheme(Scheme):
    """Int8 weights, unless others are given, and 4-bit activations."""

    def read_input(self) -> Activations:
        return FourBits()


@dataclass(frozen=True)
class Halved(Method):
    """Half the scale: the largest weights are clipped, all others are rounded twice as finely."""

    def qparams(self, weights: WeightFormat, weight: torch.Tensor) -> QParams:
        q = weights.qparams(weight)
        return replace(q, scale=q.scale / 2)


@dataclass(frozen=True)
class ZeroIdle(Method):
    """Gives the code of 0.0 to the weights of input channels that were 0 in all data."""

    needs_data: ClassVar[bool] = True

    def reason_to_refuse(self, scheme: Any) -> str:
        if scheme.activations.prepared is not PreparedLinear:
            return f"ZeroIdle does not go with {scheme.name}, whose layers watch the input in their own way"
        return ""

    def prepared(self, scheme: Any) -> type[PreparedLinear]:
        return Watching

    def choose_codes(self, prepared: Any) -> QuantizedTensor:
        idle = prepared.float_weight().detach().masked_fill(~prepared.is_used, 0.0)
        return prepared.weight_qparams.quantize(idle)


class Watching(PreparedLinear):
    """Knows which input channels are ever anything but 0."""

    def __init__(self, linear: Any, scheme: Any, **options: Any):
        super().__init__(linear, scheme, **options)
        self.register_buffer("is_used", torch.zeros(linear.in_features, dtype=torch.bool))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.is_calibrating:
            self.is_used |= (input.detach() != 0).reshape(-1, self.in_features).any(0)
        return super().forward(input)

    def _calibrated(self) -> torch.Tensor:
        own = super()._calibrated()
        return self.is_used.any() if own is None else own & self.is_used.any()


SYMMETRIC, AFFINE = Group4(), Group4(symmetric=False)
# Every way to read the input, with weights of the toy format.
GROUP_SCHEMES = [
    octavo.Int8Dynamic(weights=SYMMETRIC),
    octavo.Int8Dynamic(symmetric=False, weights=AFFINE),
    octavo.Int8WeightOnly(weights=AFFINE),
    octavo.Int8Static(weights=SYMMETRIC),
    octavo.Int8Static(symmetric=False, weights=AFFINE),
    octavo.LLMInt8(1.5, weights=SYMMETRIC),
    octavo.LLMInt8(1.5, weights=AFFINE),
    octavo.Int8Dynamic(weights=AFFINE, method=octavo.SmoothQuant(fold=False)),
    octavo.Int8Static(weights=SYMMETRIC, method=octavo.SmoothQuant()),
    ToyScheme(weights=SYMMETRIC),
]
