# SPDX-License-Identifier: Apache-2.0
"""What every scheme is: a frozen dataclass that says how a layer's weight becomes integers and how it then computes.

A scheme is one file in this folder. It overrides `linear`, `fake_quantize_input` to match, and what else differs from
weights with one scale for each output channel; fields are plain values, checked in __post_init__, so that a scheme can
be written to a file.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import nn

from .. import ops
from ..nn import PreparedLinear, QuantLinear
from ..observers import Observer, ObserverConfig
from ..qparams import FLOAT_DTYPES, Granularity, PerChannel, QParams


@dataclass(frozen=True)
class Scheme(ABC):
    """How linear layers are quantized. Instances compare by value and can be dictionary keys.

    weight_bits   2 .. 8: weights are codes -7 .. 7 for 4 bits, -127 .. 127 for 8. They take a byte each, whatever it is
    """

    weight_bits: int = field(default=8, kw_only=True)

    granularity: ClassVar[Granularity] = PerChannel(0)
    layer: ClassVar[type[QuantLinear]] = QuantLinear  # what freezing makes
    needs_data: ClassVar[bool] = False  # whether batches must be seen before freezing
    calibration_passes: ClassVar[int] = 1  # and how often, if so

    def __post_init__(self) -> None:
        bits = self.weight_bits
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise TypeError(f"{self.name}: weight_bits must be an int, got {bits!r}")
        if not 2 <= bits <= 8:
            raise ValueError(f"{self.name}: weight_bits must be in 2 .. 8, got {bits}")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def has_zero_point(self) -> bool:
        """Whether the input's codes have one that calibration finds."""
        return False

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """The instances that `octavo study` measures. Here: each combination of boolean fields, the defaults first."""
        flags = {field.name: field.default for field in fields(cls) if isinstance(field.default, bool)}
        choices = itertools.product(*((default, not default) for default in flags.values()))
        return [cls(**dict(zip(flags, values, strict=True))) for values in choices]

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """The product of a QuantLinear: x [..., k] and a packed weight of n rows to [..., n] in x's dtype.

        activation   None or the name of what is done to the result before it is rounded
        """
        raise NotImplementedError(
            f"{self.name} brings no operator: its {self.layer.__name__} has one of its own"
        )

    def quantize_linear(self, linear: nn.Linear) -> QuantLinear:
        """A packed layer that computes what `linear` does, in integers; `linear` is left as it is.

        raises   ValueError if the weight holds NaN or Inf, and if the scheme needs data
        """
        return self.freeze(self.prepare_linear(linear))

    def prepare_linear(
        self, linear: nn.Linear, *, estimator: str = "clipped", learn_scales: bool = False
    ) -> PreparedLinear:
        """A layer to calibrate and train, which holds the Parameters of `linear`."""
        return PreparedLinear(linear, self, estimator=estimator, learn_scales=learn_scales)

    def freeze(self, prepared: PreparedLinear) -> QuantLinear:
        """A packed layer with the codes that `prepared` has now; `prepared` is left as it is.

        raises   ValueError if the weight holds NaN or Inf, if a learned scale is NaN, Inf or 0, and if the layer is not
                 calibrated
        """
        prepared.require_scales()
        q = prepared.quantized_weight
        bias = None if prepared.bias is None else prepared.bias.detach().clone()
        layer = self.layer.from_codes(q.codes, q.scale[:, None], bias, self)
        layer.weight_dtype = prepared.weight.dtype
        return layer.train(prepared.training).pack_()

    def weight_qparams(self, weight: torch.Tensor) -> QParams:
        """Those that cover the range of `weight` [n, k]. Raises: ValueError for NaN or Inf."""
        qmax = 2 ** (self.weight_bits - 1) - 1
        scale, zero_point = ops.choose_qparams(self.granularity.to_rows(weight), -qmax, qmax, True)
        shape = self.granularity.qparams_shape(weight.shape)
        return QParams(scale.reshape(shape), zero_point.reshape(shape), -qmax, qmax, self.granularity)

    def input_qparams(self, observer: Observer) -> QParams:
        """Those of the input, once a scheme with an observer has calibrated it."""
        raise NotImplementedError(f"{self.name} observes no inputs")

    @abstractmethod
    def fake_quantize_input(self, x: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        """What the integer layer that `layer` becomes will read of x [..., k], as floats in x's dtype."""

    def fake_quantize_bias(self, bias: torch.Tensor, layer: PreparedLinear) -> torch.Tensor:
        """What the integer layer that `layer` becomes will add for `bias` [n], in its dtype."""
        return bias

    def reason_to_keep(self, linear: nn.Linear) -> str | None:
        """Why this scheme cannot serve `linear`, in words for the report; None if it can."""
        weight, bias = linear.weight, linear.bias
        if weight.is_meta:
            return "the weight is on the meta device: load it first"
        if weight.device.type != "cpu":
            return f"the weight is on {weight.device}: octavo runs on the CPU"
        if weight.dtype not in FLOAT_DTYPES:
            return f"the weight is {_short(weight.dtype)}: float32, bfloat16 and float16 are served"
        if bias is not None and bias.dtype not in FLOAT_DTYPES:
            return f"the bias is {_short(bias.dtype)}: float32, bfloat16 and float16 are served"
        if weight.numel() == 0:
            return f"the weight is empty: {list(weight.shape)}"
        return None

    def compressed_tensors_activations(self) -> dict[str, Any] | None:
        """The activations as compressed-tensors' QuantizationArgs say it; None: they stay float."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """{"name": class name, field: value, ...}, JSON; `octavo.schemes.from_dict` reads it back."""
        return {"name": self.name, **{item.name: _plain(getattr(self, item.name)) for item in fields(self)}}


def from_dict(fields: dict[str, Any]) -> Scheme:
    """The scheme that `Scheme.to_dict` wrote. Raises ValueError for a scheme or a field this version does not know."""
    options = dict(fields)
    name = options.pop("name", None)
    schemes = {scheme.__name__: scheme for scheme in Scheme.__subclasses__()}
    if name not in schemes:
        raise ValueError(
            f"scheme {name!r} is unknown, this version of octavo has {', '.join(sorted(schemes))}"
        )
    try:
        return schemes[name](**options)
    except TypeError as error:
        raise ValueError(f"scheme {name} cannot be made from {options}: {error}") from error


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def label(scheme: Scheme | ObserverConfig) -> str:
    """The name and what is not at its default: "Int8Dynamic(symmetric=False)", "SmoothQuant(then=Int8Static(MinMax))".

    The first field, unless it is a flag, goes without its name, as one writes it.
    """
    own = sorted(fields(scheme), key=lambda item: bool(item.kw_only))
    required = {item.name: getattr(scheme, item.name) for item in own if item.default is MISSING}
    default, changed = type(scheme)(**required), []
    for item in own:
        value = getattr(scheme, item.name)
        if item.name in required or value != getattr(default, item.name):
            text = label(value) if isinstance(value, Scheme | ObserverConfig) else repr(value)
            is_bare = item is own[0] and not item.kw_only and not isinstance(value, bool)
            changed.append(text if is_bare else f"{item.name}={text}")
    return f"{scheme.name}({', '.join(changed)})" if changed else scheme.name
