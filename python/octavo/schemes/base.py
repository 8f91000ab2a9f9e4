# SPDX-License-Identifier: Apache-2.0
"""What every scheme is: a weight format, activations and a method, three choices under one short name.

A scheme is one file in this folder, a frozen dataclass whose fields are plain values, checked in __post_init__, so that
a scheme can be written to a file. It says which activations its fields stand for; everything else is theirs, the
format's or the method's.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..activations import Activations, Dynamic, SixteenBits
from ..base import configs
from ..base.configs import Config, label
from ..base.float_types import FLOAT_DTYPES
from ..formats import CoarseInt8, Int8, IntGroup, WeightFormat
from ..methods import Method, RoundToNearest, default_method
from ..nn import PreparedEmbedding, PreparedLinear, QuantEmbedding, QuantLinear
from ..nn.replacements import bias_of, embedding_of


@dataclass(frozen=True)
class Scheme(Config, ABC):
    """How linear layers are quantized.

    weights   the weight format
    method    which codes are chosen, and what is learned from data first: octavo.SmoothQuant() for example. None: what
              is best for these weights without data, which `default_method` says
    raises    TypeError for what is no format and no method, ValueError for a method that does not go with the rest
    """

    weights: WeightFormat = field(default=Int8(), kw_only=True)
    method: Method = field(default=None, kw_only=True)  # type: ignore[assignment]
    activations: Activations = field(init=False, repr=False, compare=False)

    unserved: ClassVar[str] = "{} is {}: float32, bfloat16 and float16 are served"

    def __post_init__(self) -> None:
        formats = f"{', '.join(f'{name}()' for name in configs.kinds(WeightFormat))} of octavo.formats"
        weights = configs.instance(f"{self.name}: weights", WeightFormat, self.weights, formats)
        methods = f"{', '.join(f'octavo.{name}()' for name in configs.kinds(Method))}"
        weights = self.read_weights(weights)
        method: Any = default_method(weights) if self.method is None else self.method
        method = configs.instance(f"{self.name}: method", Method, method, methods)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "activations", self.read_input())
        reason = self.activations.reason_to_refuse(weights) or method.reason_to_refuse(self)
        if reason:
            raise ValueError(f"{self.name}: {reason}")

    def read_weights(self, weights: WeightFormat) -> WeightFormat:
        """The weights that the fields stand for, one of which says `weights`."""
        return weights

    @abstractmethod
    def read_input(self) -> Activations:
        """The activations that the fields stand for."""

    def with_weights(self, weights: WeightFormat) -> Scheme:
        """The same scheme with weights of another format; a method that was the default is the new default."""
        return replace(self, weights=weights, method=self._method_for_others)

    @property
    def _method_for_others(self) -> Any:
        return None if self.method == default_method(self.weights) else self.method

    @classmethod
    def study_variants(cls) -> list[Scheme]:
        """The instances that `octavo study` measures. Here: each combination of boolean fields, the defaults first."""
        flags = {item.name: item.default for item in fields(cls) if isinstance(item.default, bool)}
        choices = itertools.product(*((default, not default) for default in flags.values()))
        options: list[dict[str, Any]] = [dict(zip(flags, values, strict=True)) for values in choices]
        return [cls(**each) for each in options]

    @classmethod
    def short_names(cls) -> Mapping[str, dict[str, Any]]:
        """Names that stand for instances of this class, and their fields."""
        return {}

    # --- what it asks of data and of layers -------------------------------------------------------------------------

    @property
    def needs_data(self) -> bool:
        """Whether batches must be seen before freezing."""
        return self.calibration_passes > 0

    @property
    def calibration_passes(self) -> int:
        """How often they must be run."""
        return self.method.passes(self)

    @property
    def layer(self) -> type[QuantLinear]:
        """The class of a frozen linear layer with this scheme."""
        return self.method.layer(self)

    def layer_for(self, module: nn.Module) -> type[QuantLinear]:
        """The class of the frozen layer that takes the place of `module`, a float layer."""
        return self.layer if embedding_of(module) is None else QuantEmbedding

    @property
    def for_embedding(self) -> Scheme:
        """The same scheme for an embedding and for what shares its weight, with the nearest codes: a method that fits
        them to what a tied head reads would do so at the cost of the embedding."""
        return replace(self, method=RoundToNearest())

    def reason_to_keep(self, linear: Any) -> str | None:
        """Why this scheme cannot serve `linear`, in words for the report; None if it can."""
        weight, bias = linear.weight, bias_of(linear)
        if weight.is_meta:
            return "the weight is on the meta device: load it first"
        if weight.device.type != "cpu":
            return f"the weight is on {weight.device}: octavo runs on the CPU"
        if weight.dtype not in FLOAT_DTYPES:
            return self.unserved.format("the weight", _short(weight.dtype))
        if bias is not None and bias.dtype not in FLOAT_DTYPES:
            return self.unserved.format("the bias", _short(bias.dtype))
        if weight.numel() == 0:
            return f"the weight is empty: {list(weight.shape)}"
        if weight.dim() != 2:
            return f"the weight is no matrix: {list(weight.shape)}"
        return None

    # --- from a float layer to a frozen one -------------------------------------------------------------------------

    def quantize_linear(self, linear: nn.Module) -> QuantLinear:
        """A packed layer that computes what `linear` does, in integers; `linear` is left as it is.

        raises   ValueError if the weight holds NaN or Inf, and if the scheme needs data
        """
        return self.freeze(self.prepare_linear(linear))

    def prepare_linear(
        self, linear: nn.Module, *, estimator: str = "clipped", learn_scales: bool = False
    ) -> PreparedLinear:
        """A layer to calibrate and train, which holds the Parameters of `linear`.

        raises   ValueError for another estimator, and for learned scales of a format with zero points or fixed scales
        """
        if learn_scales and self.weights.has_zero_points:
            raise ValueError(
                f"learn_scales: weights of {label(self.weights)} have zero points, which cannot be learned; use "
                "learn_scales=False or a symmetric format"
            )
        if learn_scales and self.weights.fixed_scales:
            raise ValueError(
                f"learn_scales: the scales of {label(self.weights)} {self.weights.fixed_scales} and cannot be learned; "
                "use learn_scales=False or a format with scales of float32, such as NF4(double_quant=False)"
            )
        is_embedding = embedding_of(linear) is not None
        kind = PreparedEmbedding if is_embedding else self.method.prepared(self)
        observer = None if is_embedding else self.activations.observer()
        return kind(linear, self, observer=observer, estimator=estimator, learn_scales=learn_scales)

    def freeze(self, prepared: PreparedLinear, shares: QuantLinear | None = None) -> QuantLinear:
        """A packed layer with the codes that `prepared` has now; `prepared` is left as it is.

        shares   the frozen layer whose weight the new one shall share, because their float weights are tied

        raises   ValueError if the weight holds NaN or Inf, if a learned scale is NaN, Inf or 0, and if the layer is not
                 calibrated
        """
        prepared.require_calibrated()
        prepared.require_scales()
        is_embedding = isinstance(prepared, PreparedEmbedding)
        bias = None if prepared.bias is None else prepared.bias.detach().clone()
        scheme = self.method.frozen_scheme(prepared)
        kind = QuantEmbedding if is_embedding else scheme.layer
        if shares is None:
            codes = prepared.quantized_weight if is_embedding else self.method.choose_codes(prepared)
            shape = prepared.out_features, prepared.in_features
            layer = kind.from_tensors(self.weights.store(codes), bias, scheme, shape=shape)
        else:
            layer = kind.sharing(shares, bias, scheme)
        layer.weight_dtype, layer.replaces = prepared.weight.dtype, prepared.replaces
        layer.train(prepared.training).pack_()
        if isinstance(layer, QuantEmbedding):
            layer.take_settings_(prepared)
        else:
            self.activations.finish_(layer, prepared)
            self.method.finish_(layer, prepared)
        return layer


@dataclass(frozen=True)
class GroupScheme(Scheme):
    """A scheme of integer weights in groups: its fields are those of octavo.formats.IntGroup, which `weights` is."""

    group_size: int | None = 32
    bits: int = 4
    symmetric: bool = True
    scale_dtype: str = field(default="float16", kw_only=True)
    weights: WeightFormat = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        format = IntGroup(self.bits, self.group_size, self.symmetric, self.scale_dtype)
        object.__setattr__(self, "weights", format)
        super().__post_init__()

    def with_weights(self, weights: WeightFormat) -> Scheme:
        options = {item.name: getattr(weights, item.name) for item in fields(IntGroup)}
        return replace(self, **options, method=self._method_for_others)


@dataclass(frozen=True)
class CodebookScheme(Scheme, ABC):
    """A scheme of codebooks or blocks: its fields are those of the format of its name, and a choice of activations."""

    weights: WeightFormat = field(init=False, repr=False, compare=False)
    activations: Any = field(default="int8", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self.format())
        super().__post_init__()

    @abstractmethod
    def format(self) -> WeightFormat:
        """The weight format that the fields stand for."""

    def read_input(self) -> Activations:
        given: Any = self.activations
        word = (
            given.get("name") if isinstance(given, Mapping) else given
        )  # the command line has a name for a word
        if word == "int8":
            return Dynamic(group_size=input_group_size(getattr(self.weights.granularity, "group_size", None)))
        if word == "int16":
            return SixteenBits()
        accepted = "'int8', 'int16' and what octavo.activations has"
        return configs.instance(f"{self.name}: activations", Activations, given, accepted)


def input_group_size(group_size: int | None) -> int | None:
    """How many elements of an input share a scale if the weights have groups of `group_size`: the next multiple of
    32, which is how kernels cut k."""
    return None if group_size is None else -(-group_size // 32) * 32


def with_bits(scheme: Scheme, weights: WeightFormat, bits: int) -> WeightFormat:
    """What the field `bits` of a scheme of 8-bit weights makes of its `weights`: Int8(bits), unless others are given.

    raises   TypeError, ValueError for bits that Int8 does not have, and for weights that have others
    """
    if bits not in (7, 8):
        raise ValueError(
            f"{scheme.name}: bits must be 7 or 8, got {bits!r}; Int4Dynamic and Int4WeightOnly have 2 .. 8 bits in "
            "groups, which do become smaller"
        )
    if weights == Int8():
        return Int8(bits)
    if bits not in (8, weights.bits):
        raise ValueError(
            f"{scheme.name}: bits is {bits} and the weights are {label(weights)}; give one of the two"
        )
    return weights


def from_dict(fields: Mapping[str, Any]) -> Scheme:
    """The scheme that `Scheme.to_dict` wrote. Raises ValueError for a scheme or a field this version does not know."""
    return configs.from_dict("scheme", Scheme, _today(fields))


def by_name(text: str) -> Scheme:
    """The scheme that `text` names: "int8-dynamic", "q4_k", or with options "int8-dynamic:symmetric=false".

    Upper and lower case, hyphens and underscores do not matter. Options are plain values: true, false, numbers, words.
    raises   ValueError for a name or an option that this version does not know
    """
    name, _, rest = text.partition(":")
    kind, options = _named(name)
    known = {item.name: str(item.type) for item in fields(kind) if item.init}
    for part in filter(None, rest.split(",")):
        key, has_value, value = part.partition("=")
        if not has_value or key not in known:
            raise ValueError(
                f"scheme {text!r}: {part!r} is no option of {configs.short_name(kind)}, which has "
                f"{', '.join(f'{name}=...' for name in sorted(known))}"
            )
        options[key] = value.lower() if known[key].startswith("str") else _value(value)
    return configs.from_dict("scheme", Scheme, {"name": kind.__name__, **options})


def _named(name: str) -> tuple[type[Scheme], dict[str, Any]]:
    """The class that goes by `name`, or that has it for a short name, and the fields that it then has."""
    for kind in configs.kinds(Scheme).values():
        for short, options in kind.short_names().items():
            if configs.spelled(short) == configs.spelled(name):
                return kind, dict(options)
    return configs.named("scheme", Scheme, name), {}


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower())
    except ValueError:
        return {"name": text}  # of a format, a method, an observer


def _today(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` as they are written today. Older files have `weight_bits`, and SmoothQuant around another scheme."""
    options = dict(fields)
    if options.get("name") == "SmoothQuant" and "then" in options:
        then = _today(options["then"])
        smoothing = {key: options[key] for key in ("name", "alpha", "fold") if key in options}
        return {**then, "method": smoothing}
    bits = options.pop("weight_bits", 8)
    if bits != 8:
        options["weights"] = CoarseInt8(bits).to_dict()
    return options


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
